"""Prediction: frames are read and judged here, and what judges is tested before its first answer."""
