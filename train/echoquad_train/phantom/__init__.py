"""Phantoms: synthetic four-chamber frames and data sets of them, for tests and the demo."""
