"""The transparent colour of a PNG is laid over black."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from echoquad_runtime.frames.images.image import decode_grey


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: np.ndarray, depth: int, key: tuple[int, ...] | None, *, interlaced: bool = False) -> bytes:
    """Return a PNG of samples [H, W] or [H, W, 3] with the transparent colour `key`."""
    height, width = samples.shape[:2]
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    elif depth == 8:
        rows = [row.astype(np.uint8).tobytes() for row in samples]
    else:
        places = samples[..., None] >> np.arange(depth - 1, -1, -1) & 1
        rows = [np.packbits(row.astype(np.uint8)).tobytes() for row in places.reshape(height, -1)]
    header = struct.pack(">IIBBBBB", width, height, depth, 2 if samples.ndim == 3 else 0, 0, 0, interlaced)
    transparent = b"" if key is None else chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", header) + transparent + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


RNG = np.random.default_rng(0)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_grey_becomes_black(depth: int) -> None:
    samples = RNG.integers(0, min(1 << depth, 20), (16, 24))
    key = min(19, (1 << depth) - 1)
    opaque = decode_grey(png(samples, depth, None))
    found = decode_grey(png(samples, depth, (key,)))
    np.testing.assert_array_equal(found, np.where(samples == key, 0, opaque))
    if depth < 16:  # bits above those of the samples do not count
        np.testing.assert_array_equal(decode_grey(png(samples, depth, (key | 1 << depth,))), found)


@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_rgb_becomes_black(depth: int) -> None:
    samples = RNG.integers(0, 2, (16, 24, 3)) * 200
    samples[0] += 1  # of 16 bits the same upper bytes, and another colour
    key = (200, 0, 200)
    transparent = (samples == key).all(axis=2)
    assert transparent.any()
    opaque = decode_grey(png(samples * (1 if depth == 8 else 256) + (depth == 16), depth, None))
    scaled = samples * (1 if depth == 8 else 256) + (depth == 16)
    found = decode_grey(png(scaled, depth, tuple(value * (1 if depth == 8 else 256) + (depth == 16) for value in key)))
    np.testing.assert_array_equal(found, np.where(transparent, 0, opaque))


def test_16_bit_colours_are_compared_with_all_bits() -> None:
    samples = np.full((4, 4, 3), 0x8000)
    samples[2:] += 1
    found = decode_grey(png(samples, 16, (0x8000, 0x8000, 0x8000)))
    np.testing.assert_array_equal(found, np.where(np.arange(4)[:, None] < 2, 0, np.full((4, 4), 0x80)))
