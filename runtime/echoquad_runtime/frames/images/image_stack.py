"""An image file whose frames are read as those of a clip: a TIFF of several pages, or an animated PNG."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO, Final

import numpy as np
from PIL import Image

from echoquad_runtime.errors import FrameDamagedError, FrameFormatError
from echoquad_runtime.frames.decoded_frame import ColourFrame, DecodedFrame
from echoquad_runtime.frames.file_access import OpenStream
from echoquad_runtime.frames.formats import TIFF_SIGNATURES
from echoquad_runtime.frames.images.animated_png import AnimatedPng, compose, read_animation
from echoquad_runtime.frames.images.image import decode_grey_and_flags, decode_image
from echoquad_runtime.frames.images.image_integrity import PNG_SIGNATURE
from echoquad_runtime.frames.images.several_images import has_animation
from echoquad_runtime.frames.images.tiff_file import TiffFile
from echoquad_runtime.frames.quality_flags import COLOUR
from echoquad_runtime.quadrants import Grey

__all__ = ["ImageStack"]

_CACHE_BYTES: Final = 32 << 20  # of composed frames


class ImageStack:
    """An image file of one frame or several.

    Pages of a TIFF that are reduced-resolution copies or transparency masks are no frames. The frames of an animated
    PNG are those that a player shows.

    Parameters
    ----------
    open_stream
        Opens the bytes of the file.

    Attributes
    ----------
    frame_count
        Number of frames in the file.
    stated_frame_count
        Number of frames that it states; more than `frame_count` if it is truncated.
    multi_frame
        Whether it states several frames.
    in_memory
        False.

    Raises
    ------
    FrameError
        If it is not an image of several frames, or its header is damaged or exceeds a limit.
    """

    in_memory = False

    def __init__(self, open_stream: OpenStream) -> None:
        self._open = open_stream
        self._lock = threading.Lock()
        self._pages: list[int] = []  # positions in the file
        self._animation: AnimatedPng | None = None
        self._composed: Iterator[Image.Image] | None = None
        self._next = 1
        self._cache: OrderedDict[int, Image.Image] = OrderedDict()
        with open_stream() as stream:
            head = stream.read(len(PNG_SIGNATURE))
            if head.startswith(TIFF_SIGNATURES):
                self.frame_count, self.stated_frame_count = self._find_pages(stream)
            elif head == PNG_SIGNATURE and has_animation(stream):
                self._animation = read_animation(stream)
                self.frame_count, self.stated_frame_count = len(self._animation.frames), self._animation.stated
            else:
                raise FrameFormatError("the file holds a single image; expected a TIFF or an animated PNG")
        hides_default = self._animation is not None and self._animation.hides_default
        self.multi_frame = self.stated_frame_count > 1 or hides_default

    def _find_pages(self, stream: IO[bytes]) -> tuple[int, int]:
        cut = 0
        try:
            for page in TiffFile(stream).pages():
                self._pages.append(page.position)
        except FrameDamagedError:
            if not self._pages:
                raise
            cut = 1  # at least
        if not self._pages:
            raise FrameFormatError("not supported: a TIFF of thumbnails or masks alone; expected an image")
        return len(self._pages), len(self._pages) + cut

    def decode(self, number: int, flip: str) -> DecodedFrame:
        """Decode a frame, counted from 1; `flip` is for matrices and ignored.

        Raises
        ------
        FrameError
            If it cannot be decoded.
        """
        if not 1 <= number <= self.frame_count:
            raise FrameDamagedError(f"there is no frame {number}; the file holds {self.frame_count}")
        if self._animation is None:
            with self._open() as stream:
                return _Page(TiffFile(stream).extract_at(self._pages[number - 1]))
        with self._lock:
            return ColourFrame(np.asarray(self._compose(self._animation, number)))

    def _compose(self, animation: AnimatedPng, number: int) -> Image.Image:
        if number in self._cache:
            return self._cache[number]
        if self._composed is None or number < self._next:
            self._composed, self._next = compose(animation, self._open), 1
        for canvas in self._composed:
            found, self._next = self._next, self._next + 1
            self._cache[found] = canvas
            while len(self._cache) > max(1, _CACHE_BYTES // (3 * canvas.width * canvas.height)):
                self._cache.popitem(last=False)
            if found == number:
                return canvas
        self._composed = None
        raise FrameDamagedError("the frame depends on one that is damaged: copy the file again")


class _Page:
    """A page of a TIFF, as a file of its own, which is decoded as any TIFF."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._grey, flags = decode_grey_and_flags(data)
        self._coloured = COLOUR in flags
        self.flags = tuple(flag for flag in flags if flag != COLOUR)

    def grey(self) -> Grey:
        """Return the grey levels, uint8 [H, W]."""
        return self._grey

    def is_coloured(self) -> bool:
        """Return whether a substantial part is coloured."""
        return self._coloured

    def image(self) -> Image.Image:
        """Return the picture in the mode in which it is stored."""
        return decode_image(self._data)
