"""From files to predictions: reading, batching, inference and the vote."""
