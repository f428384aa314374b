"""From files to grey frames: discovery, formats, decoding, integrity checks, quality flags."""
