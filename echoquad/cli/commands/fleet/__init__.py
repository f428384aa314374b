"""``echoquad fleet``: look after many services."""
