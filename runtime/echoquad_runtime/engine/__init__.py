"""The inference engine: IO binding, inference slots, the power-on self-test, and diagnostics of the host."""
