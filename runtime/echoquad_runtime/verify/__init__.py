"""Checks of a bundle: inspection of its files, and verification that it decides on this host as it did at export."""
