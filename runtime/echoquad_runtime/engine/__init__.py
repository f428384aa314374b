"""From quadrants to probabilities: IO binding, inference slots, the power-on self-test."""
