"""Curation: audit a data set, find duplicates, leaks and shortcut features, and write splits and quadrant files."""
