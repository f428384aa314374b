"""Headers of file formats, read without a decoder: what they announce, what the file holds, and bounds of both."""
