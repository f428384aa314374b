"""TIFF pages that Pillow misreads: planes of 16 bits, 9 to 15 bits, white as zero, byte order, palettes, signs."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError
from echoquad_runtime.frames.images.image import decode_grey, decode_image

HEIGHT, WIDTH = 21, 34
Y, X = np.mgrid[:HEIGHT, :WIDTH]
SHARES = np.stack([np.clip(0.5 + 0.5 * np.sin(X / (5 + k) + k) * np.cos(Y / 6), 0, 1) for k in range(4)], axis=-1)
"""Four smooth channels, [H, W, 4], in [0, 1]."""

PREDICTOR = {1: lambda rows: rows, 2: lambda rows: np.diff(rows, axis=1, prepend=np.zeros_like(rows[:, :1]))}


def pack(samples: np.ndarray, bits: int, order: str) -> bytes:
    """Pack unsigned samples, [rows, count], as rows of whole bytes."""
    if bits in (8, 16, 32):
        return samples.astype(f"{order}u{bits // 8}").tobytes()
    places = samples[..., None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(places.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()


def tiff(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    separate: bool = False,
    deflate: bool = False,
    predictor: int = 1,
    rows_per_strip: int = 8,
    tags: dict[int, tuple[int, ...]] | None = None,
) -> bytes:
    """Return a TIFF of samples [H, W, S]: unsigned numbers of `bits` bits."""
    height, width, count = samples.shape
    samples = PREDICTOR[predictor](samples.astype(np.int64)) & ((1 << bits) - 1)
    planes = [samples[..., [k]] for k in range(count)] if separate else [samples]
    strips = [
        pack(plane[top : top + rows_per_strip].reshape(-1, width * plane.shape[2]), bits, order)
        for plane in planes
        for top in range(0, height, rows_per_strip)
    ]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    offsets = np.cumsum([8, *map(len, strips)]).tolist()
    values: dict[int, tuple[int, ...]] = {
        256: (width,),
        257: (height,),
        258: (bits,) * count,
        259: (8 if deflate else 1,),
        262: (photometric,),
        273: tuple(offsets[:-1]),
        277: (count,),
        278: (rows_per_strip,),
        279: tuple(map(len, strips)),
        284: (2 if separate else 1,),
        317: (predictor,),
        **(tags or {}),
    }
    begin = offsets[-1]
    directory, extra = b"", b""
    for tag, numbers in sorted(values.items()):
        data = struct.pack(f"{order}{len(numbers)}I", *numbers)
        behind = begin + 2 + 12 * len(values) + 4 + len(extra)
        field = data if len(numbers) == 1 else struct.pack(order + "I", behind)
        extra += b"" if len(numbers) == 1 else data
        directory += struct.pack(order + "HHI", tag, 4, len(numbers)) + field
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, begin)
    return head + b"".join(strips) + struct.pack(order + "H", len(values)) + directory + bytes(4) + extra


def stored(channels: int, bits: int) -> np.ndarray:
    return np.round(SHARES[..., :channels] * ((1 << bits) - 1)).astype(np.int64)


ENCODINGS: list[dict[str, Any]] = [
    {"order": order, "deflate": deflate, "predictor": predictor}
    for order in "<>"
    for deflate, predictor in ((False, 1), (True, 1), (True, 2))
]


@pytest.mark.parametrize("options", ENCODINGS, ids=str)
@pytest.mark.parametrize("bits", [9, 10, 12, 14, 15])
def test_samples_of_9_to_15_bits_are_scaled_by_their_own_white(bits: int, options: dict[str, Any]) -> None:
    samples = stored(1, bits)
    expected = np.floor(samples[..., 0] * 255 / ((1 << bits) - 1) + 0.5)
    np.testing.assert_array_equal(decode_grey(tiff(samples, bits, 1, **options)), expected)
    inverted = (1 << bits) - 1 - samples
    np.testing.assert_array_equal(decode_grey(tiff(inverted, bits, 0, **options)), expected)


def test_predictor_without_compression_is_ignored_as_libtiff_does() -> None:
    data = tiff(np.full((2, 4, 1), 100), 12, 1, tags={317: (2,)})
    np.testing.assert_array_equal(decode_grey(data), np.full((2, 4), 6))


@pytest.mark.parametrize("options", ENCODINGS, ids=str)
@pytest.mark.parametrize(("photometric", "channels"), [(2, 3), (2, 4), (5, 4)], ids=["rgb", "rgba", "cmyk"])
def test_separate_planes_of_16_bits_equal_interleaved_samples(
    photometric: int, channels: int, options: dict[str, Any]
) -> None:
    samples = stored(channels, 16)
    tags = {338: (2,)} if photometric == 2 and channels == 4 else {}
    planes = decode_image(tiff(samples, 16, photometric, separate=True, tags=tags, **options))
    together = decode_image(tiff(samples, 16, photometric, tags=tags, **options))
    assert planes.mode == together.mode
    np.testing.assert_array_equal(np.asarray(planes), np.asarray(together))
    eight = decode_image(tiff(samples >> 8, 8, photometric, separate=True, tags=tags))
    np.testing.assert_array_equal(np.asarray(planes), np.asarray(eight))


@pytest.mark.parametrize("bits", [10, 12])
def test_colours_of_9_to_15_bits_are_read(bits: int) -> None:
    samples = stored(3, bits)
    expected = decode_grey(tiff(samples >> (bits - 8), 8, 2))
    for separate in (False, True):
        np.testing.assert_array_equal(decode_grey(tiff(samples, bits, 2, separate=separate)), expected)


@pytest.mark.parametrize("options", ENCODINGS, ids=str)
def test_16_bits_of_which_0_is_white_are_inverted(options: dict[str, Any]) -> None:
    samples = stored(1, 16)
    expected = decode_grey(tiff(samples, 16, 1, **options))
    np.testing.assert_array_equal(decode_grey(tiff(65535 - samples, 16, 0, **options)), expected)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_grey_with_alpha_is_over_black(bits: int, deflate: bool, separate: bool) -> None:
    samples = stored(2, bits)
    found = decode_grey(tiff(samples, bits, 1, separate=separate, deflate=deflate, tags={338: (2,)}))
    np.testing.assert_allclose(found, SHARES[..., 0] * SHARES[..., 1] * 255, atol=2)
    opaque = decode_grey(tiff(samples, bits, 1, separate=separate, deflate=deflate, tags={338: (0,)}))
    np.testing.assert_allclose(opaque, SHARES[..., 0] * 255, atol=0.5)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_numbers_in_either_byte_order_are_read(order: str, deflate: bool) -> None:
    floats = SHARES[..., :1].astype("<f4").view("<u4")
    expected = np.floor(SHARES[..., 0].astype(np.float32).astype(float) * 255 + 0.5)
    found = decode_grey(tiff(floats, 32, 1, order=order, deflate=deflate, tags={339: (3,)}))
    np.testing.assert_array_equal(found, expected)
    signed = stored(1, 15)
    found = decode_grey(tiff(signed, 16, 1, order=order, deflate=deflate, tags={339: (2,)}))
    np.testing.assert_array_equal(found, (signed[..., 0] + 128) // 257)


def test_negative_8_bit_samples_are_refused() -> None:
    samples = stored(1, 8) // 2
    np.testing.assert_array_equal(decode_grey(tiff(samples, 8, 1, tags={339: (2,)})), samples[..., 0])
    samples[3, 4] = 200
    with pytest.raises(FrameFormatError, match="negative"):
        decode_grey(tiff(samples, 8, 1, tags={339: (2,)}))


def test_palette_of_8_bit_entries_is_not_black() -> None:
    samples = stored(1, 8)
    entries = tuple(range(256)) * 3
    found = decode_grey(tiff(samples, 8, 3, tags={320: entries}))
    np.testing.assert_array_equal(found, samples[..., 0])
    deep = tuple(entry * 257 for entry in entries)
    np.testing.assert_array_equal(decode_grey(tiff(samples, 8, 3, tags={320: deep})), samples[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_to_other_tiffs(orientation: int) -> None:
    tags = {274: (orientation,)}
    expected = decode_grey(tiff(stored(1, 8), 8, 1, tags=tags))
    found = decode_grey(tiff(stored(1, 8) * 257 >> 4, 12, 1, tags=tags))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("bits", "photometric", "tags"),
    [(64, 1, {339: (3,)}), (24, 1, {}), (8, 9, {}), (32, 0, {339: (3,)}), (12, 1, {266: (2,)})],
)
def test_unread_kinds_are_named_as_not_supported(bits: int, photometric: int, tags: dict[int, tuple[int, ...]]) -> None:
    data = tiff(np.zeros((8, 8, 1), int), 16, photometric, tags={258: (bits,), **tags})
    with pytest.raises(FrameFormatError, match=r"not supported: a TIFF of 1 .*samples of"):
        decode_grey(data)


def test_missing_strips_of_planes_are_damage() -> None:
    data = tiff(stored(3, 16), 16, 2, separate=True)
    with pytest.raises(FrameDamagedError):
        decode_grey(data[: data.index(struct.pack("<HHI", 273, 4, 9)) + 8] + b"\xff\xff\xff\x7f")
    with pytest.raises(FrameDamagedError):
        decode_grey(tiff(stored(3, 16), 16, 2, separate=True, tags={257: (400,)}))
