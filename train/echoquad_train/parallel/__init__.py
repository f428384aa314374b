"""Data-parallel training in several processes: torchrun, ranks, layers that share batches."""
