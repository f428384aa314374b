"""BMP files with bit masks of any kind, and empty alpha channels."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError
from echoquad_runtime.frames.images.image import decode_grey, decode_image

HEIGHT, WIDTH = 5, 7
SHARES = np.random.default_rng(1).random((HEIGHT, WIDTH, 4))


def bmp(bits: int, masks: tuple[int, int, int, int], *, header: int = 108, top_down: bool = False) -> bytes:
    """Return a BMP whose channels are those of SHARES, scaled to the bits of each mask."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint32)
    for share, mask in zip(np.moveaxis(SHARES, 2, 0), masks, strict=True):
        if mask:
            shift = (mask & -mask).bit_length() - 1
            pixels |= np.round(share * (mask >> shift)).astype(np.uint32) << np.uint32(shift)
    stride = (WIDTH * bits + 31) // 32 * 4
    rows = [row.astype(f"<u{bits // 8}").tobytes().ljust(stride, b"\0") for row in pixels]
    begin = 14 + header + (12 if header == 40 else 0)
    fields = struct.pack("<IiiHHIIiiII", header, WIDTH, -HEIGHT if top_down else HEIGHT, 1, bits, 3, 0, 0, 0, 0, 0)
    rest = struct.pack("<4I", *masks)[: 12 if header == 40 else 16].ljust(begin - 54, b"\0")
    data = b"".join(rows if top_down else rows[::-1])
    return b"BM" + struct.pack("<IHHI", begin + len(data), 0, 0, begin) + fields + rest + data


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize(
    ("bits", "masks", "header"),
    [
        (16, (0xF800, 0x07E0, 0x001F, 0), 40),
        (16, (0x0F00, 0x00F0, 0x000F, 0xF000), 108),
        (16, (0x000F, 0x00F0, 0x0F00, 0), 40),
        (16, (0x7C00, 0x03E0, 0x001F, 0), 108),
        (32, (0x3FF00000, 0x000FFC00, 0x000003FF, 0), 40),
        (32, (0x000000FF, 0x0000FF00, 0x00FF0000, 0), 108),
        (32, (0xFF000000, 0x0000FF00, 0x000000FF, 0x00FF0000), 108),
        (32, (0x00FF0000, 0x0000FF00, 0x000000FF, 0xFF000000), 124),
    ],
)
def test_channels_are_scaled_by_their_masks(
    bits: int, masks: tuple[int, int, int, int], header: int, top_down: bool
) -> None:
    image = decode_image(bmp(bits, masks, header=header, top_down=top_down))
    assert image.mode == ("RGBA" if masks[3] else "RGB")
    for channel, share, mask in zip(
        np.moveaxis(np.asarray(image), 2, 0), np.moveaxis(SHARES, 2, 0), masks, strict=False
    ):
        white = mask >> (mask & -mask).bit_length() - 1
        np.testing.assert_allclose(channel, np.round(share * white) / white * 255, atol=1)


def test_alpha_that_is_0_everywhere_is_not_used() -> None:
    masks = (0x00FF0000, 0x0000FF00, 0x000000FF, 0xFF000000)
    data = bytearray(bmp(32, masks))
    begin = 14 + 108
    data[begin + 3 :: 4] = bytes(len(data[begin + 3 :: 4]))
    np.testing.assert_array_equal(decode_grey(bytes(data)), decode_grey(bmp(32, (*masks[:3], 0))))


def test_unread_bmps_are_named_as_not_supported() -> None:
    data = bytearray(bmp(32, (0xFF0000, 0xFF00, 0xFF, 0)))
    struct.pack_into("<I", data, 30, 5)
    with pytest.raises(FrameFormatError, match="not supported: a BMP of PNG"):
        decode_grey(bytes(data))


def test_damaged_masks_and_missing_rows_are_refused() -> None:
    with pytest.raises(FrameDamagedError, match="mask"):
        decode_grey(bmp(16, (0x0F0F, 0x00F0, 0x0000, 0)))
    data = bmp(16, (0x000F, 0x00F0, 0x0F00, 0))
    for cut in (1, 20, len(data) - 60):
        with pytest.raises(FrameDamagedError):
            decode_grey(data[:-cut])
