"""Reduced precision: float16, and int8 with its calibration set."""
