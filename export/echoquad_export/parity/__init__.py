"""Evidence that an export decides as the training code does: parity, golden frames and metrics."""
