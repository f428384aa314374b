"""Prediction over many frames: who reads them, who judges them, and the test of what judges before its first answer."""
