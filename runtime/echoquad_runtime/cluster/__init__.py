"""Prediction on a Ray cluster."""
