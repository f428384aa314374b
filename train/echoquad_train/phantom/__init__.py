"""Synthetic echo frames."""
