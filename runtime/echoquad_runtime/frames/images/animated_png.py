"""Animated PNG: the frames that a player shows, composed one after the other (PNG, third edition, 11.3.6).

A frame is a region of the canvas. Each is decoded as a PNG of its own, with the checks of any PNG.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Final

from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameTooLargeError
from echoquad_runtime.frames.file_access import OpenStream
from echoquad_runtime.frames.formats import MAX_FILE_BYTES, MAX_FRAMES, MAX_PIXELS
from echoquad_runtime.frames.images.image import decode_layer
from echoquad_runtime.frames.images.image_integrity import MAX_PNG_CHUNKS, PNG_SIGNATURE

__all__ = ["AnimatedPng", "compose", "read_animation"]

_PIECE_BYTES: Final = 1 << 20
_KEPT: Final = (b"PLTE", b"tRNS", b"gAMA", b"sBIT")  # chunks of the file that concern each frame
_MAX_KEPT_BYTES: Final = 768  # of a palette
_DISPOSE_BACKGROUND, _DISPOSE_PREVIOUS = 1, 2
_BLEND_OVER: Final = 1


@dataclass
class _Frame:
    """A frame: its region of the canvas, how it is drawn, and where its data are in the file."""

    width: int
    height: int
    left: int
    top: int
    dispose: int
    blend: int
    data: list[tuple[int, int]] = field(default_factory=list)  # position and number of bytes


@dataclass
class AnimatedPng:
    """An animation.

    Attributes
    ----------
    header, shared
        Content of the header chunk, and the chunks that each frame needs.
    frames
        The frames that are in the file.
    stated
        Number of frames that it states.
    hides_default
        Whether the image that other programs show is not part of the animation.
    """

    header: bytes
    shared: bytes
    frames: list[_Frame]
    stated: int
    hides_default: bool

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the canvas."""
        width, height = struct.unpack(">II", self.header[:8])
        return width, height


def _chunks(stream: IO[bytes]) -> Iterator[tuple[bytes, int, int, bytes]]:
    """Yield the type of each chunk, the position and length of its content, and the first megabyte of the content.

    Ends at a chunk that is cut off or fails its checksum.
    """
    position = stream.seek(len(PNG_SIGNATURE))
    for _ in range(MAX_PNG_CHUNKS):
        head = stream.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        if length > MAX_FILE_BYTES:
            return
        checksum, missing, content = zlib.crc32(kind), length, b""
        while missing:
            piece = stream.read(min(missing, _PIECE_BYTES))
            if not piece:
                return
            checksum, missing = zlib.crc32(piece, checksum), missing - len(piece)
            content = content or piece  # the first megabyte
        if stream.read(4) != struct.pack(">I", checksum):
            return
        yield kind, position + 8, length, content
        position = stream.seek(position + 12 + length)
    raise FrameDamagedError(f"the PNG has more than {MAX_PNG_CHUNKS} chunks; expected a few; save it again")


def read_animation(stream: IO[bytes]) -> AnimatedPng:
    """Read where the frames of an animated PNG are. A default image that is not part of the animation is no frame.

    Raises
    ------
    FrameError
        If the header is damaged, or exceeds a limit.
    """
    header, shared, stated, sequence, hidden = b"", b"", 0, 0, False
    frames: list[_Frame] = []
    for kind, position, length, content in _chunks(stream):
        if kind == b"IHDR" and length == 13:
            header = content
        elif kind == b"acTL" and length == 8:
            stated = struct.unpack(">I", content[:4])[0]
        elif kind in _KEPT and length <= _MAX_KEPT_BYTES:
            shared += struct.pack(">I", length) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        elif kind in (b"fcTL", b"fdAT"):
            if not _add_to_frames(frames, kind, position, length, content, sequence):
                break  # chunks are missing or out of order
            sequence += 1
        elif kind == b"IDAT":
            hidden = hidden or not frames
            if frames:
                frames[-1].data.append((position, length))
        elif kind == b"IEND":
            break
    else:  # the last frame is cut off
        frames = frames[:-1]
    frames = [frame for frame in frames if frame.data]
    if not header or not frames:
        raise FrameDamagedError("the animated PNG has no complete frame: it is damaged or truncated; copy it again")
    animation = AnimatedPng(header, shared, frames[:stated], stated, hidden)
    width, height = animation.size
    if stated > MAX_FRAMES or width * height > MAX_PIXELS:
        raise FrameTooLargeError(
            f"the animated PNG states {stated} frames of {width}x{height} pixels; expected at most {MAX_FRAMES} frames "
            f"of {MAX_PIXELS // 1_000_000} million"
        )
    return animation


def _add_to_frames(
    frames: list[_Frame], kind: bytes, position: int, length: int, content: bytes, sequence: int
) -> bool:
    """Add a frame (fcTL), or data to the last one (fdAT); return whether the chunk has the right sequence number."""
    if length < (26 if kind == b"fcTL" else 4) or content[:4] != struct.pack(">I", sequence):
        return False
    if kind == b"fcTL":
        frames.append(_Frame(*struct.unpack(">IIIIxxxxBB", content[4:26])))
    elif frames:
        frames[-1].data.append((position + 4, length - 4))
    return True


def compose(animation: AnimatedPng, open_stream: OpenStream) -> Iterator[Image.Image]:
    """Yield the canvas of each frame, RGB, laid over black.

    Raises
    ------
    FrameError
        If a frame is damaged; the frames behind it may depend on it.
    """
    canvas = Image.new("RGBA", animation.size)
    for number, frame in enumerate(animation.frames):
        right, bottom = frame.left + frame.width, frame.top + frame.height
        if not frame.width or not frame.height or right > animation.size[0] or bottom > animation.size[1]:
            raise FrameDamagedError("a frame of the animated PNG leaves its canvas: it is damaged; save it again")
        box = (frame.left, frame.top, right, bottom)
        # What the frame covers is needed once more only if it is to be restored.
        before = canvas.copy() if frame.dispose == _DISPOSE_PREVIOUS and number else None
        layer = decode_layer(_frame_file(animation, frame, open_stream))
        if frame.blend == _BLEND_OVER:
            canvas.alpha_composite(layer, box[:2])
        else:
            canvas.paste(layer, box)
        del layer  # canvas, copy and picture of the largest frame take 430 MB
        shown = Image.new("RGB", canvas.size)
        shown.paste(canvas, mask=canvas.getchannel("A"))
        yield shown
        if before is not None:
            canvas = before
        elif frame.dispose in (_DISPOSE_BACKGROUND, _DISPOSE_PREVIOUS):
            canvas.paste((0, 0, 0, 0), box)


def _frame_file(animation: AnimatedPng, frame: _Frame, open_stream: OpenStream) -> bytes:
    """Return a frame as a PNG file."""
    if sum(length for _, length in frame.data) > MAX_FILE_BYTES:
        raise FrameTooLargeError(f"the frame has more than {MAX_FILE_BYTES} bytes; save it as PNG")
    pieces = [b"IHDR" + struct.pack(">II", frame.width, frame.height) + animation.header[8:]]
    with open_stream() as stream:
        data = b"IDAT" + b"".join(stream.read(length) for at, length in frame.data if stream.seek(at) == at)
    pieces += [data, b"IEND"]
    header, pixels, end = (
        struct.pack(">I", len(piece) - 4) + piece + struct.pack(">I", zlib.crc32(piece)) for piece in pieces
    )
    return PNG_SIGNATURE + header + animation.shared + pixels + end
