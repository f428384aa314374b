"""What `echoquad train` runs: gradient training, linear probes, cross-validation, resume."""
