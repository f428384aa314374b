"""What a model gets right: scores, metrics, bootstrap intervals, calibration, abstention."""
