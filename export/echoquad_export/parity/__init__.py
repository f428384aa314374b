"""Proof that an export decides as the training code: parity, golden frames, metrics."""
