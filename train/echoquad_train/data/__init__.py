"""Labelled frames: listing, decoding, prefetching, streaming, and the patient of each frame."""
