"""Pictures: a data set's readable frames, with what tells two of them to be alike; for the audit and for splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from echoquad_runtime.errors import EchoQuadError
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.quadrants import Grey
from echoquad_train.curation.similarity import CENTRED, SHIFTED, Bits, View, hashes, thumbnail
from echoquad_train.data.frame_list import DecodedFile, FrameRecord, read_all

__all__ = ["Pictures", "read_pictures"]

THOROUGH: Final = 20_000
"""Frames up to which copies that were cut on some sides only are looked for: the work grows with their square."""


@dataclass(slots=True)
class Pictures:
    """What was read.

    Attributes
    ----------
    views
        The views that `hashes` were taken of.
    read, failures
        The frames that can be read, and those that cannot.
    thumbs, hashes, pixels
        Of each readable frame: its thumbnail, the hashes of its views, the digest of its grey levels.
    """

    views: Sequence[View]
    read: list[FrameRecord] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    thumbs: list[Grey] = field(default_factory=list)
    hashes: list[Bits] = field(default_factory=list)
    pixels: list[bytes] = field(default_factory=list)


def read_pictures(
    frames: Sequence[FrameRecord],
    *,
    progress: Callable[[int, int], None] | None = None,
    also: Callable[[DecodedFile], None] | None = None,
) -> Pictures:
    """Read frames once, in order.

    Parameters
    ----------
    frames
        From `gather`.
    progress
        Called with the number of frames read and of all.
    also
        Called with what each readable frame holds, which is not kept.
    """
    found = Pictures(SHIFTED if len(frames) <= THOROUGH else CENTRED)
    for done, (frame, content) in enumerate(read_all(frames), 1):
        if isinstance(content, EchoQuadError):
            found.failures.append(Failure(frame.name, content))
        else:
            found.read.append(frame)
            found.thumbs.append(thumbnail(content.grey))
            found.hashes.append(hashes(found.thumbs[-1], found.views))
            found.pixels.append(content.pixel_digest)
            if also is not None:
                also(content)
        if progress is not None:
            progress(done, len(frames))
    return found
