"""Export: from a PyTorch run to a bundle that has been held against it. Imports train and runtime."""
