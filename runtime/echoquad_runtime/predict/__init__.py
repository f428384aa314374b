"""From frames to predictions: the predictor, its worker pool and frame readers, and the `Prediction`."""
