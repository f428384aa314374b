"""Frames: finding them, recognising their file formats, decoding them to 8-bit grey, and flagging their quality."""
