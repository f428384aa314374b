"""Prediction over many frames: how frames are read, and by whom."""
