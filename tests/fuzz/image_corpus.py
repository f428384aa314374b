"""Corpus of image files: every kind of pixel that a frame may have, damage, unsupported files, and decompression bombs.

All files follow from names and numbers, so that a failing one can be made again.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["ADAM7", "BOMBS", "LARGEST", "SEEDS", "UNSUPPORTED", "chunk", "damage", "png"]

HEIGHT, WIDTH = 40, 56
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row of each Adam7 pass of an interlaced PNG, and the steps between its columns and rows."""


# ---------------------------------------------------------------------------------------------- writing


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    size: tuple[int, int],
    rows: bytes,
    *,
    depth: int = 8,
    colour: int = 0,
    interlaced: bool = False,
    before: bytes = b"",
    pieces: int = 1,
) -> bytes:
    """Return a PNG of filtered `rows`, with the chunks `before` in front of the pixels."""
    packed = zlib.compress(rows)
    step = -(-len(packed) // pieces)
    idat = b"".join(chunk(b"IDAT", packed[at : at + step]) for at in range(0, len(packed), step))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, int(interlaced)))
    return b"\x89PNG\r\n\x1a\n" + header + before + idat + chunk(b"IEND")


def interlace(pixels: np.ndarray) -> bytes:
    """Return grey pixels in the order of the Adam7 passes, unfiltered."""
    passes = [pixels[y::dy, x::dx] for x, y, dx, dy in ADAM7]
    return b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)


@functools.cache
def repeated(size: int, byte: bytes = b"\0") -> bytes:
    """Return `size` equal bytes, deflated: one megabyte is compressed once and its block is repeated."""
    packer, block = zlib.compressobj(9, zlib.DEFLATED, -15), byte * (1 << 20)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    count, rest = divmod(size, len(block))
    check = 1
    for _ in range(count):
        check = zlib.adler32(block, check)
    tail = packer.compress(byte * rest) + packer.flush()
    return b"\x78\xda" + packed * count + tail + struct.pack(">I", zlib.adler32(byte * rest, check))


def png_of_stated_size(
    size: tuple[int, int], packed: bytes, depth: int = 8, colour: int = 0, before: bytes = b""
) -> bytes:
    """Return a PNG whose header states `size`, whatever the compressed rows hold."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", packed) + chunk(b"IEND")


def tiff(entries: list[tuple[int, int, int, int]], tail: bytes = b"", following: int = 0) -> bytes:
    """Return a TIFF of entries (tag, type, count and value), then `tail`."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", following) + tail


# ---------------------------------------------------------------------------------------------- valid files


def smooth_picture() -> np.ndarray:
    """Return a smooth picture with a little noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    channels = [128 + 70 * np.sin(x / (9 + i) + i) * np.cos(y / (7 + 2 * i)) for i in range(3)]
    return (np.stack(channels, axis=-1) + rng.normal(0, 3, (HEIGHT, WIDTH, 3))).round().astype(np.uint8)


def seeds() -> Iterator[tuple[str, bytes]]:
    colour, rng = Image.fromarray(smooth_picture()), np.random.default_rng(4)
    grey = colour.convert("L")
    alpha = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH), np.uint8))
    deep = np.asarray(grey).astype(np.uint16) * 257 + rng.integers(0, 99, (HEIGHT, WIDTH)).astype(np.uint16)
    modes: dict[str, Image.Image] = {
        "1": grey.convert("1"),
        "L": grey,
        "LA": Image.merge("LA", [grey, alpha]),
        "P": colour.quantize(40),
        "RGB": colour,
        "RGBA": Image.merge("RGBA", [*colour.split(), alpha]),
        "CMYK": colour.convert("CMYK"),
        "YCbCr": colour.convert("YCbCr"),
        "I;16": Image.fromarray(deep),
        "I": Image.fromarray(deep.astype(np.int32)),
        "F": Image.fromarray(np.asarray(grey).astype(np.float32) / 255),
    }
    known = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "BMP": ("1", "L", "P", "RGB", "RGBA"),
        "TIFF": tuple(modes),
    }
    for file_format, names in known.items():
        for name in names:
            yield f"{file_format} {name}", encode(modes[name], file_format)
    yield "PNG P transparent", encode(modes["P"], "PNG", transparency=3)
    yield "PNG P transparent bytes", encode(modes["P"], "PNG", transparency=bytes(range(0, 200, 5)))
    yield "PNG L transparent", encode(grey, "PNG", transparency=100)
    wide = rng.integers(0, 256, (HEIGHT, 1 + WIDTH * 6), np.uint8)
    wide[:, 0] = np.arange(HEIGHT) % 5  # every filter
    yield "PNG RGB 16", png((WIDTH, HEIGHT), wide.tobytes(), depth=16, colour=2, pieces=3)
    yield "PNG interlaced", png((WIDTH, HEIGHT), interlace(np.asarray(grey)), interlaced=True)
    texts = chunk(b"tEXt", b"Comment\0hello") + chunk(b"zTXt", b"z\0\0" + zlib.compress(b"text" * 50))
    yield "PNG texts", png((4, 3), bytes(15), before=texts + chunk(b"gAMA", struct.pack(">I", 45455)))
    exif = Image.Exif()
    exif[0x0112] = 6
    for file_format in ("PNG", "JPEG", "TIFF"):
        yield f"{file_format} turned", encode(grey, file_format, exif=exif)
    yield "JPEG progressive", encode(colour, "JPEG", progressive=True)
    yield "JPEG optimised", encode(colour, "JPEG", optimize=True, quality=95, subsampling=0)
    yield "JPEG restarts", encode(colour, "JPEG", restart_marker_blocks=2)
    yield "JPEG rgb", encode(colour, "JPEG", keep_rgb=True)
    yield "JPEG profile", encode(colour, "JPEG", icc_profile=bytes(70_000), comment=b"hello")
    yield "MPO", encode(grey, "MPO", save_all=True, append_images=[grey])
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"TIFF {compression}", encode(colour, "TIFF", compression=compression)
    yield "TIFF strips", encode(grey, "TIFF", tiffinfo={278: 8})
    yield "TIFF big-endian", encode(Image.frombytes("I;16B", (WIDTH, HEIGHT), deep.astype(">u2").tobytes()), "TIFF")
    for width, height in ((1, 1), (2, 2), (3, 10_000), (10_000, 3)):
        for file_format in ("PNG", "JPEG", "BMP", "TIFF"):
            yield f"{file_format} {width}x{height}", encode(np.full((height, width), 90, np.uint8), file_format)


SEEDS: dict[str, bytes] = dict(seeds())
"""Valid files: each is a frame."""


def unsupported() -> Iterator[tuple[str, bytes]]:
    grey = Image.fromarray(smooth_picture()).convert("L")
    yield "empty", b""
    yield "zeros", bytes(1000)
    yield "text", b"file,label\n1,A\n"
    yield "PNG signature only", b"\x89PNG\r\n\x1a\n"
    yield "JPEG signature only", b"\xff\xd8\xff"
    yield "BMP signature only", b"BM"
    yield "TIFF signature only", b"II*\0"
    for file_format in ("GIF", "WEBP", "PPM", "ICO"):
        yield f"wrongly named {file_format}", encode(grey, file_format)
    pages = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (0, 100, 200)]
    for file_format in ("PNG", "TIFF"):
        yield f"animated {file_format}", encode(pages[0], file_format, save_all=True, append_images=pages[1:])
    for compression in ("group4", "group3"):
        yield f"TIFF {compression}", encode(grey.convert("1"), "TIFF", compression=compression)
    yield "LAB", encode(Image.new("LAB", (9, 8)), "TIFF")
    yield "integers out of range", encode(np.full((4, 4), -1, np.int32), "TIFF")
    yield "no number", encode(np.full((4, 4), np.nan, np.float32), "TIFF")
    yield "no pixels", png((0, 5), b"")
    yield "a row too few", png((9, 5), bytes(40))
    cut = encode(grey, "JPEG")
    yield "jpeg with an end marker added", cut[: len(cut) * 3 // 4] + b"\xff\xd9"


UNSUPPORTED: dict[str, bytes] = dict(unsupported())
"""Files that are not frames."""


# ---------------------------------------------------------------------------------------------- damage


def damage(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damage a file as bad disks and broken copies do; return it and a description of the damage."""
    size = len(data)
    # Half of the damage hits the header, which is a small part of the file.
    at = rng.randrange(min(size, 120)) if rng.random() < 0.5 else rng.randrange(size)
    length, to = rng.choice([1, 2, 4, 16, 300]), rng.randrange(size)
    operations: dict[str, Callable[[], bytes]] = {
        "cut": lambda: data[:at],
        "cut near its end": lambda: data[: -rng.randrange(1, 20)],
        "cut, with an end marker added": lambda: data[:at] + rng.choice([b"\xff\xd9", chunk(b"IEND"), bytes(1000)]),
        "beginning lost": lambda: data[at:],
        "bit flipped": lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        "byte set": lambda: data[:at] + bytes([rng.choice([0, 1, 127, 128, 255])]) + data[at + 1 :],
        "number set": lambda: (
            data[:at] + rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)]) + data[at + 4 :]
        ),
        "bytes inserted": lambda: data[:at] + rng.randbytes(length) + data[at:],
        "bytes deleted": lambda: data[:at] + data[at + length :],
        "zeroed": lambda: data[:at] + bytes(len(data[at : at + length])) + data[at + length :],
        "block copied": lambda: data[:to] + data[at : at + length] + data[to:],
        "noise": lambda: data[:at] + rng.randbytes(size - at),
        "garbage at the end": lambda: data + rng.randbytes(length),
        "itself at the end": lambda: data + data,
    }
    what = rng.choice(list(operations))
    return operations[what](), f"{what} at {at}"


# ---------------------------------------------------------------------------------------------- bombs

EDGE = 6000  # side of the largest square frame


def profile(size: int) -> bytes:
    return chunk(b"iCCP", b"profile\0\0" + repeated(size))


def pages(count: int) -> bytes:
    """Return a TIFF of `count` chained pages of one pixel."""
    entries = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    entries += [(278, 4, 1, 1), (279, 4, 1, 1)]
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    step = len(table) + 4
    following = [8 + step * (page + 1) for page in range(count - 1)] + [0]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(table + struct.pack("<I", to) for to in following)


def many_scans(count: int, side: int) -> bytes:
    data = encode(np.zeros((side, side), np.uint8), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def jpeg_of(side: int) -> bytes:
    """Return a JPEG of 64 pixels whose header states `side` squared."""
    data = bytearray(encode(np.zeros((8, 8), np.uint8), "JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, side, side)
    return bytes(data)


def raw_turned() -> bytes:
    """Return an uncompressed 16-bit RGB TIFF of the largest size, with an EXIF orientation."""
    side, offset = EDGE, 208
    entries = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 1, offset), (274, 3, 1, 6), (277, 3, 1, 3), (278, 4, 1, side), (279, 4, 1, 6 * side**2)]
    depths = struct.pack("<HHH", 16, 16, 16)
    head = tiff(entries)
    return (head + bytes(200 - len(head)) + depths).ljust(offset, b"\0") + bytes(6 * side**2)


BOMBS: dict[str, Callable[[], bytes]] = {
    "grey, 400 MB": lambda: png_of_stated_size((20_000, 20_000), repeated(20_001 * 20_000)),
    "a header of 2^31 squared": lambda: png_of_stated_size((2**31 - 1, 2**31 - 1), zlib.compress(b"")),
    "one row of 2^31": lambda: png_of_stated_size((2**31 - 1, 1), zlib.compress(b"")),
    "far more rows than stated": lambda: png_of_stated_size((100, 100), repeated(100 << 20)),
    "profile of 100 MB": lambda: png((4, 3), bytes(15), before=profile(100 << 20)),
    "zTXt of 100 MB": lambda: png((4, 3), bytes(15), before=chunk(b"zTXt", b"a\0\0" + repeated(100 << 20, b"a"))),
    "iTXt of 100 MB": lambda: png((4, 3), bytes(15), before=chunk(b"iTXt", b"a\0\1\0\0\0" + repeated(100 << 20, b"a"))),
    "zTXt, 500 of 1 MB": lambda: png(
        (4, 3), bytes(15), before=chunk(b"zTXt", b"a\0\0" + repeated(1 << 20, b"a")) * 500
    ),
    "zTXt after the pixels": lambda: (
        png((4, 3), bytes(15))[:-12] + chunk(b"zTXt", b"a\0\0" + repeated(100 << 20, b"a")) + chunk(b"IEND")
    ),
    "300 000 chunks": lambda: png((4, 3), bytes(15), before=chunk(b"aaAa") * 300_000),
    "TIFF of 30 000 pages": lambda: pages(30_000),
    "TIFF that is its own next page": lambda: pages(1)[:-4] + struct.pack("<I", 8),
    "TIFF with a tag of 2^32 values": lambda: tiff([(256, 4, 1, 9), (257, 4, 1, 9), (273, 4, 2**32 - 1, 8)]),
    "TIFF of 2^32 pixels a side": lambda: tiff([(256, 4, 1, 2**32 - 1), (257, 4, 1, 2**32 - 1), (273, 4, 1, 8)]),
    "JPEG of 65 500 squared": lambda: jpeg_of(65_500),
    "JPEG of 400 scans": lambda: many_scans(400, 1000),
    "JPEG of a million segments": lambda: (
        (data := encode(np.zeros((8, 8), np.uint8), "JPEG"))[:20] + b"\xff\xfe\0\2" * 1_000_000 + data[20:]
    ),
    "JPEG with 30 MB between segments": lambda: (
        (data := encode(np.zeros((8, 8), np.uint8), "JPEG"))[:20] + b"\xff" * (30 << 20) + data[20:]
    ),
    "BMP of 2^31 rows": lambda: (
        (data := encode(np.zeros((8, 8), np.uint8), "BMP"))[:18] + struct.pack("<ii", 8, -(2**31)) + data[26:]
    ),
}
"""Small files that ask for unlimited memory or time; each is refused, or read within the limits."""

LARGEST: dict[str, Callable[[], bytes]] = {
    "alpha at the limit": lambda: png_of_stated_size((EDGE, EDGE), repeated((4 * EDGE + 1) * EDGE), colour=6),
    "colour of 16 bits at the limit": lambda: png_of_stated_size((EDGE, EDGE), repeated((6 * EDGE + 1) * EDGE), 16, 2),
    "grey of 16 bits at the limit": lambda: png_of_stated_size((EDGE, EDGE), repeated((2 * EDGE + 1) * EDGE), 16, 0),
    "palette with transparency at the limit": lambda: png_of_stated_size(
        (EDGE, EDGE), repeated((EDGE + 1) * EDGE), 8, 3, chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\0\x80")
    ),
    "progressive JPEG at the limit": lambda: encode(Image.new("RGB", (EDGE, EDGE)), "JPEG", progressive=True),
    "progressive CMYK at the limit": lambda: encode(
        Image.new("CMYK", (EDGE, EDGE)), "JPEG", progressive=True, subsampling=0
    ),
    "raw colour of 16 bits at the limit, rotated": raw_turned,
    "CMYK at the limit": lambda: encode(Image.new("CMYK", (EDGE, EDGE)), "JPEG"),
    "floats at the limit": lambda: encode(Image.new("F", (EDGE, EDGE)), "TIFF", compression="tiff_adobe_deflate"),
    "integers at the limit": lambda: encode(Image.new("I", (EDGE, EDGE)), "TIFF", compression="tiff_adobe_deflate"),
    "rotated at the limit": lambda: png_of_stated_size(
        (EDGE, EDGE), repeated((3 * EDGE + 1) * EDGE), 8, 2, chunk(b"eXIf", _turned())
    ),
    "many scans at the limit": lambda: many_scans(60, EDGE),
}
"""The largest frames that are accepted."""


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes().removeprefix(b"Exif\0\0")
