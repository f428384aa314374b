"""The frames that a run of ``echoquad predict`` classifies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echoquad_runtime.frames.formats import ReadOptions
    from echoquad_runtime.frames.frame_file import Failure, FrameFile
    from echoquad_runtime.results.result_file import ResultFile
    from echoquad_runtime.results.shards import Shard

__all__ = ["FrameSelection"]


class FrameSelection:
    """Iterator over the frames of a shard that have no row yet, found lazily, and over inputs that failed.

    Attributes
    ----------
    found, selected
        Number of frames found so far; of these, the number to classify.
    yielded
        Number of frames and failures yielded so far.
    complete
        Whether all inputs are listed.
    kept
        Number of rows of an interrupted run.
    skipped
        The hidden and system entries skipped so far.
    """

    def __init__(
        self, inputs: Sequence[str], reading: ReadOptions, shard: Shard | None, rows: ResultFile | None
    ) -> None:
        from echoquad_runtime.frames.discovery import find_frames
        from echoquad_runtime.storage.system_files import SkippedEntries

        self.found = self.selected = self.yielded = 0
        self.complete = False
        self.kept = rows.existing_rows if rows is not None else 0
        self._shard, self._rows = shard, rows
        self._peeked: list[FrameFile | Failure] = []
        self.skipped = SkippedEntries()
        self._remaining = self._select(find_frames(inputs, reading, self.skipped))

    def _select(self, items: Iterator[FrameFile | Failure]) -> Iterator[FrameFile | Failure]:
        from echoquad_runtime.frames.frame_file import FrameFile

        for item in items:
            if isinstance(item, FrameFile):
                self.found += 1
                if self._shard is not None and not self._shard.holds(item.name):
                    continue
                if self._rows is not None and self._rows.claim(item.name):
                    continue
                self.selected += 1
            self.yielded += 1
            yield item
        self.complete = True

    @property
    def has_result(self) -> bool:
        """Whether the run has a result even without a new row: rows from before, or a shard, which may be empty.

        False if no frame was found at all: an archive that is not mounted is not finished.
        """
        return self.found > 0 and (self.kept > 0 or self._shard is not None)

    def peek(self, count: int) -> Sequence[FrameFile | Failure]:
        """Return the first `count` items, or fewer if there are fewer, without consuming them."""
        self._peeked = list(islice(self._remaining, count))
        return self._peeked

    def __iter__(self) -> Iterator[FrameFile | Failure]:
        return chain(self._peeked, self._remaining)
