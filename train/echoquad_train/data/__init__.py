"""Data: frames read, audited, split, cut into quadrants and made up."""
