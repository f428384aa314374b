"""Graphs of reduced precision: int8 with its calibration set, and fp16."""
