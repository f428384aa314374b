"""Image files of several frames: TIFF of several pages, and animated PNG."""
