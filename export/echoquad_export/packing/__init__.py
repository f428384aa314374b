"""Packing: writes a bundle beside its target, checks it, and moves it into place."""
