"""The procedures behind `echoquad train`: the training loop, linear probes, cross-validation, resume."""
