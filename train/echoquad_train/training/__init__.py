"""Training: the parts of an optimizer step, and how they run on a device."""
