"""The watch over a live source: whether frames come, whether they show a picture, and whether it moves.

==============  ======================================================================================
state           rule
==============  ======================================================================================
``ok``          frames come, show something, and change
``frozen``      frames come, and for `PATIENCE_S` seconds no part of the picture has changed
``no signal``   for `PATIENCE_S` seconds no frame has come, or every frame was of a single colour
``stopped``     the source has not been started, or was closed
==============  ======================================================================================

A part of the picture has changed if the mean absolute difference of a block of 8x8 pixels is more than `MIN_CHANGE`
grey levels, against the picture that was there at the last change. A codec refines a still picture and refreshes it
with each key frame, by up to 12 levels in a block (H.264, MPEG-4 and Motion JPEG at ordinary rates); sensor noise
changes single pixels, and a mean of 64 of them by 3 levels. One digit of a clock changes a block by 50.

So a scanner that shows a still picture of its own, with a clock, a cursor or an electrocardiogram that runs, is ``ok``.
A picture in which nothing at all moves is ``frozen``, whether the scanner or the line stands still: pixels do not tell
them apart. Frames are decided in every state. The state is beside each decision.

A single colour is one from which 999 of 1,000 pixels differ by less than `MIN_CONTRAST` grey levels: the black or blue
screen of a grabber without a signal, with its noise. A dark ultrasound picture has captions.
"""

from __future__ import annotations

import threading
from typing import Final, Literal

from PIL import Image, ImageChops

from echoquad_runtime.quadrants import Grey

__all__ = ["MIN_CHANGE", "MIN_CONTRAST", "PATIENCE_S", "State", "Watchdog"]

State = Literal["ok", "frozen", "no signal", "stopped"]

PATIENCE_S: Final = 1.7
"""Seconds until a change to the worse counts. With `LOOK_S` and the time to tell it, it is told within two seconds."""

LOOK_S: Final = 0.1
"""Seconds between two looks at a picture."""

MIN_CHANGE: Final = 16
"""Grey levels by which the mean of a block must change."""

MIN_CONTRAST: Final = 20
"""Grey levels that a picture must span."""

_BLOCK: Final = 8  # pixels
_TAIL: Final = 0.0005  # share of the pixels that are ignored at either end


class Watchdog:
    """Finds the state of a source. Any thread may call any method.

    Times are seconds of `time.monotonic`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reference: Image.Image | None = None
        self._started: float | None = None
        self._last_frame = self._last_look = self._last_change = self._last_content = -1.0
        self._state: State = "stopped"

    def start(self, now: float) -> None:
        """Begin the watch: the source is ``stopped`` until its first frame, or until that is late."""
        with self._lock:
            self._started = now
            self._last_frame = now

    def stop(self) -> None:
        """End the watch; the state is ``stopped`` from now on."""
        with self._lock:
            self._started, self._reference, self._state = None, None, "stopped"

    def observe(self, grey: Grey, now: float) -> None:
        """Take a frame, uint8 [H, W], into account."""
        with self._lock:
            first = self._reference is None or now - self._last_frame >= PATIENCE_S
            self._last_frame = now
            if not first and now - self._last_look < LOOK_S:
                return
            self._last_look = now
            picture = Image.fromarray(grey)
            if first or _has_changed(self._reference, picture):
                self._reference, self._last_change = picture, now
            if not _is_blank(picture):
                self._last_content = now

    def state(self, now: float) -> State:
        """Return the state at a time."""
        with self._lock:
            if self._started is None:
                return "stopped"
            if now - self._last_frame >= PATIENCE_S:
                self._state = "no signal"
            elif self._reference is not None:
                self._state = self._state_of_picture()
            return self._state

    def frozen_for(self, now: float) -> float:
        """Return for how many seconds the picture has been frozen; 0 if it is not."""
        with self._lock:
            return now - self._last_change if self._state == "frozen" else 0.0

    def _state_of_picture(self) -> State:
        if self._last_content < self._last_look:  # blank; it may be a moment, such as a change of menus
            return "no signal" if self._state != "ok" or self._last_look - self._last_content >= PATIENCE_S else "ok"
        return "frozen" if self._last_frame - self._last_change >= PATIENCE_S else "ok"


def _has_changed(before: Image.Image | None, now: Image.Image) -> bool:
    """Return whether a block of the picture has changed by more than codecs and noise change it."""
    if before is None or before.size != now.size:
        return True
    _, most = ImageChops.difference(before, now).reduce(_BLOCK).getextrema()
    return float(most) > MIN_CHANGE  # type: ignore[arg-type]


def _is_blank(picture: Image.Image) -> bool:
    """Return whether a picture has a single colour."""
    counts = picture.histogram()
    ignored = sum(counts) * _TAIL
    return _first_level(counts[::-1], ignored) + _first_level(counts, ignored) > 255 - MIN_CONTRAST


def _first_level(counts: list[int], ignored: float) -> int:
    seen = 0
    for level, count in enumerate(counts):
        seen += count
        if seen > ignored:
            return level
    return len(counts)
