"""The files of a training run: checkpoints, metadata, history, TensorBoard events, ensembles of runs."""
