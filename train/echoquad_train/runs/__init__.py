"""Runs: what training leaves in a run folder, and how it gets there."""
