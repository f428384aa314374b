"""Triton Inference Server: a model repository with the frame graph of a bundle."""
