"""Frame scan: one pass over a data set that keeps what duplicate detection needs of each readable frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from echoquad_runtime.errors import EchoQuadError
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.quadrants import Grey
from echoquad_train.curation.similarity import CENTRED, SHIFTED, HashBits, View, perceptual_hashes, thumbnail
from echoquad_train.data.dataset import LabelledFrame, Progress
from echoquad_train.data.frame_list import DecodedFile, read_all

__all__ = ["FrameScan", "scan_frames"]

SHIFTED_LIMIT: Final = 20_000
"""Frames up to which off-centre crops are searched for as well: the work grows with the square of their number."""


@dataclass(slots=True)
class FrameScan:
    """The result of `scan_frames`.

    Attributes
    ----------
    views
        The views that were hashed.
    frames, failures
        The readable frames, and the unreadable ones.
    thumbnails, hashes, pixel_digests
        One entry per readable frame: the thumbnail, the hashes of its views, the digest of its grey levels.
    """

    views: Sequence[View]
    frames: list[LabelledFrame] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    thumbnails: list[Grey] = field(default_factory=list)
    hashes: list[HashBits] = field(default_factory=list)
    pixel_digests: list[bytes] = field(default_factory=list)


def scan_frames(
    frames: Sequence[LabelledFrame],
    *,
    progress: Progress | None = None,
    visit: Callable[[DecodedFile], None] | None = None,
) -> FrameScan:
    """Read each frame once, in order; `visit` is called with each decoded frame, which is not kept."""
    scan = FrameScan(SHIFTED if len(frames) <= SHIFTED_LIMIT else CENTRED)
    for done, (frame, content) in enumerate(read_all(frames), 1):
        if isinstance(content, EchoQuadError):
            scan.failures.append(Failure(frame.name, content))
        else:
            scan.frames.append(frame)
            scan.thumbnails.append(thumbnail(content.grey))
            scan.hashes.append(perceptual_hashes(scan.thumbnails[-1], scan.views))
            scan.pixel_digests.append(content.pixel_digest)
            if visit is not None:
                visit(content)
        if progress is not None:
            progress(done, len(frames))
    return scan
