"""Kinds of image files that Pillow does not read, or reads otherwise than libtiff and libpng do."""
