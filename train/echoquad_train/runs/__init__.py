"""A training run on disk: checkpoints, metadata, history, ensembles of runs."""
