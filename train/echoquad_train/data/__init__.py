"""Labelled frames: listing, reading, prefetching, splits in memory or streamed, patients."""
