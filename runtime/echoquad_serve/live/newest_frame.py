"""The newest frame: a slot between a source that does not wait and decisions that take as long as they take."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from echoquad_runtime.quadrants import Grey

__all__ = ["LiveFrame", "NewestFrame"]


@dataclass(frozen=True, slots=True, eq=False)
class LiveFrame:
    """A frame of a live source.

    Attributes
    ----------
    grey
        uint8 [H, W], grey levels, as those of the same frame of a clip.
    captured
        Time of capture in seconds of `time.monotonic`.
    number
        Position among the frames that the source has delivered, from 1.
    dropped
        How many of these were dropped until now: a newer frame had come before they were taken.
    part
        Changes whenever the source begins again, so that a frame is no continuation of the one before.
    flags
        Quality flags that only the decoder can set.
    """

    grey: Grey
    captured: float
    number: int
    dropped: int = 0
    part: int = 0
    flags: tuple[str, ...] = ()


class NewestFrame:
    """A slot for one frame: a newer frame replaces one that nobody has taken, which counts as dropped."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._frame: LiveFrame | None = None
        self._dropped = 0
        self._closed = False

    @property
    def dropped(self) -> int:
        """Number of frames that were dropped until now."""
        with self._changed:
            return self._dropped

    def put(self, frame: LiveFrame) -> None:
        """Offer a frame. It never waits. A closed slot drops it."""
        with self._changed:
            if self._closed:
                self._dropped += 1
                return
            self._dropped += self._frame is not None
            self._frame = frame
            self._changed.notify()

    def get(self, timeout: float) -> LiveFrame | None:
        """Take the newest frame. Wait up to `timeout` seconds for one; return None if there is none by then."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._closed, timeout)
            frame, self._frame = self._frame, None
            return None if frame is None else replace(frame, dropped=self._dropped)

    def close(self) -> None:
        """Drop what nobody has taken, and end every wait."""
        with self._changed:
            self._dropped += self._frame is not None
            self._frame = None
            self._closed = True
            self._changed.notify_all()
