"""Fleet: ask many services what they run and how they are, and compare their answers."""
