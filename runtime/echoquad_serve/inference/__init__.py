"""Inference: the bundle in use, its replacement between two frames, and the thread that decides what waits."""
