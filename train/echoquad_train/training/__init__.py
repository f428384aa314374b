"""Parts of the training loop: batches, augmentation, step, optimizer schedule, EMA, distillation, validation."""
