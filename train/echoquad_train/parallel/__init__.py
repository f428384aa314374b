"""Training in several processes: ranks, gradient sharing, torchrun."""
