"""One training step and what feeds it: batches, augmentation, schedule, EMA weights, distillation."""
