"""Headers of JPEG 2000 codestreams, checked before OpenJPEG decodes them (ISO/IEC 15444-1, annex A).

OpenJPEG allocates memory for what headers announce: a few hundred bytes can ask for millions of precincts or packets.
The main header and that of every tile-part are walked, and what they announce is bounded.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from echoquad_runtime.errors import FrameDamagedError, FrameTooLargeError
from echoquad_runtime.frames.dicom.header import Header
from echoquad_runtime.frames.dicom.jpeg_markers import SIZE_MISMATCH

__all__ = ["CODESTREAM_START", "check_codestream"]

CODESTREAM_START: Final = b"\xff\x4f\xff\x51"

_MAX_TILES: Final = 4_096  # a frame of 36 million pixels has 2,197 of 128 x 128
_MAX_PRECINCTS: Final = 100_000  # 36 million pixels of 3 components in precincts of 64 x 64 take 35 000
_MAX_PACKETS: Final = 1_000_000  # the same in 20 layers take 700 000
_MAX_SEGMENTS: Final = 2_000  # of a header
_MAX_TILE_PARTS: Final = 4 * _MAX_TILES
_MAX_LEVELS: Final = 32

_SOT_BYTES: Final = b"\xff\x90"
_COD, _COC, _SOT, _SOD, _EOC = 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9


class _Size(NamedTuple):
    """Size of a tile, in pixels, and numbers of tiles and of components."""

    tile_width: int
    tile_height: int
    tiles: int
    components: int


def check_codestream(header: Header, data: bytes) -> tuple[int, bool]:
    """Check the codestream that begins at the start of `data`.

    Returns
    -------
    bits, signed
        Precision of the first component.

    Raises
    ------
    FrameDamagedError
        If a segment is malformed or contradicts the header, or the end is missing.
    FrameTooLargeError
        If there are too many tiles, precincts or packets.
    """
    if not data.startswith(CODESTREAM_START):
        raise FrameDamagedError("the DICOM frame is not JPEG 2000, as its header states; copy the file again")
    if b"\xff\xd9" not in data[-4:]:
        raise FrameDamagedError("the DICOM frame's JPEG 2000 has no end marker: the file is truncated; copy it again")
    size, depth, position = _read_size(header, data)
    coding, position = _read_coding(size, data, position)
    if coding is None:
        raise _malformed()
    _check_cost(size, coding)
    for _ in range(_MAX_TILE_PARTS):
        if not data.startswith(_SOT_BYTES, position) or position + 12 > len(data):
            if _SOT_BYTES in data[position:]:  # packets cannot contain it
                raise _malformed()
            break
        (length,) = struct.unpack_from(">I", data, position + 6)
        own, body = _read_coding(size, data, position + 12)
        if own is not None:
            _check_cost(size, own._replace(layers=max(own.layers, coding.layers)))
        end = position + length if length else len(data)
        if not body <= end <= len(data):
            raise _malformed()
        position = end
    else:
        raise FrameTooLargeError(f"the DICOM frame's JPEG 2000 has more than {_MAX_TILE_PARTS} tile-parts; convert it")
    return (depth & 0x7F) + 1, bool(depth & 0x80)


def _read_size(header: Header, data: bytes) -> tuple[_Size, int, int]:
    """Read and check the SIZ segment; return the sizes, the depth of the first component, and the segment's end."""
    if len(data) < 45:
        raise _malformed()
    length, _, right, bottom, left, top, *tile, components = struct.unpack_from(">HH8IH", data, 4)
    tile_width, tile_height, tile_left, tile_top = tile
    end = 4 + length
    size = (right - left, bottom - top, components)
    if size != (header.columns, header.rows, header.samples_per_pixel):
        raise FrameDamagedError(SIZE_MISMATCH)
    if length != 38 + 3 * components or end > len(data):
        raise _malformed()
    found = [(data[at], data[at + 1], data[at + 2]) for at in range(42, end, 3)]
    if any(other & 0x7F >= header.bits_allocated for other, _, _ in found):
        raise FrameDamagedError(
            "the DICOM frame's bits per sample differ from its header's; the file is damaged: copy it again"
        )
    if min(tile_width, tile_height) < 1 or tile_left > left or tile_top > top:
        raise _malformed()
    if any(min(across, down) < 1 for _, across, down in found):
        raise _malformed()
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > _MAX_TILES:
        raise FrameTooLargeError(
            f"the DICOM frame's JPEG 2000 has {tiles} tiles; expected at most {_MAX_TILES}; convert the file"
        )
    width, height = min(tile_width, right - left), min(tile_height, bottom - top)
    return _Size(width, height, tiles, components), found[0][0], end


class _Coding(NamedTuple):
    """Layers, and the precinct exponents (width, height) of each resolution for each group of components."""

    layers: int
    precincts: list[list[tuple[int, int]]]


def _read_coding(size: _Size, data: bytes, position: int) -> tuple[_Coding | None, int]:
    """Read the header that begins at `position`; return its coding style, None if it has none, and its end."""
    layers = 0
    precincts: list[list[tuple[int, int]]] = []
    wide = size.components > 256
    for _ in range(_MAX_SEGMENTS):
        if position + 4 > len(data):
            break
        marker, length = struct.unpack_from(">HH", data, position)
        if marker == _SOD:
            return (_Coding(max(layers, 1), precincts) if precincts else None), position + 2
        if marker in (_SOT, _EOC):
            return (_Coding(max(layers, 1), precincts) if precincts else None), position
        body = data[position + 4 : position + 2 + length]
        if marker < 0xFF00 or length < 2 or len(body) != length - 2:
            break
        position += 2 + length
        if marker == _COD and len(body) >= 10:
            layers = max(layers, struct.unpack_from(">H", body, 2)[0])
            precincts.append(_precincts(body[0], body[5:]))
        elif marker == _COC and len(body) >= 8:
            precincts.append(_precincts(body[1 + wide], body[2 + wide :]))
    raise _malformed()


def _precincts(style: int, parameters: bytes) -> list[tuple[int, int]]:
    levels, sizes = parameters[0], parameters[5:]
    if levels > _MAX_LEVELS:
        raise _malformed()
    if not style & 1:
        return [(15, 15)] * (levels + 1)
    if len(sizes) < levels + 1:
        raise _malformed()
    return [(exponents & 0x0F, exponents >> 4) for exponents in sizes[: levels + 1]]


def _check_cost(size: _Size, coding: _Coding) -> None:
    """Bound the number of precincts and packets, of all tiles."""
    most = 0
    for resolutions in coding.precincts:
        count = 0
        for level, (across, down) in enumerate(reversed(resolutions)):
            # A tile may begin within a precinct, hence one more.
            columns = (-(-size.tile_width // (1 << level)) >> across) + 1
            rows = (-(-size.tile_height // (1 << level)) >> down) + 1
            count += columns * rows
        most = max(most, count)
    precincts = most * size.tiles * size.components
    if precincts > _MAX_PRECINCTS or precincts * coding.layers > _MAX_PACKETS:
        raise FrameTooLargeError(
            f"the DICOM frame's JPEG 2000 has {precincts} precincts in {coding.layers} layers; expected at most "
            f"{_MAX_PRECINCTS}, and {_MAX_PACKETS} packets; convert the file"
        )


def _malformed() -> FrameDamagedError:
    return FrameDamagedError("the DICOM frame's JPEG 2000 header is malformed; the file is damaged: copy it again")
