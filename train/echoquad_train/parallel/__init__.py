"""Parallel: several processes that train together what one would alone."""
