"""Clips: their decoded frames."""
