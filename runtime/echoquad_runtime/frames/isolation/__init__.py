"""Isolation of decoders: which files a reader process decodes, the pool of these processes, and their limits."""
