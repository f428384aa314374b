"""Tools that check and make data sets: audit, duplicates, shortcut features, splits, quadrant files."""
