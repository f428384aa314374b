"""Evaluation: predictions of a split compared with its labels, as metrics, intervals, calibration and abstention."""
