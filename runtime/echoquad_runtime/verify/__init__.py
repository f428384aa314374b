"""Checks of a bundle: what it holds, and whether it decides on this host as it did at export."""
