"""Parts of the training loop: sampling, batches, augmentation, step, optimizer schedule, EMA, distillation, validation."""
