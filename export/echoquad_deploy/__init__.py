"""Deployment: what brings a bundle to machines without a network, and looks after them."""
