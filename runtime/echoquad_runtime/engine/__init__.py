"""The engine: how quadrants become logits and probabilities on a device, through one path for every caller."""
