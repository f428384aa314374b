"""Intake from folders: files that other programs write become jobs."""
