"""Evaluation: what a model came to on labelled frames: in numbers, in figures and as a report."""
