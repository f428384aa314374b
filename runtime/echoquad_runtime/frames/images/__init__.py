"""Image files: decoding to grey, integrity, files of several images, and kinds that Pillow does not read correctly."""
