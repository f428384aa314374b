"""The feed of pictures for pages: the newest one as JPEG, made only while somebody watches."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Callable, Iterator
from typing import Final

from PIL import Image

__all__ = ["PictureFeed"]

_REPEAT_S: Final = 1.0


class PictureFeed:
    """Hands the newest picture to everybody who watches.

    Parameters
    ----------
    on_watched
        Called with True when the first one begins to watch, and with False when the last one ends.
    """

    def __init__(self, on_watched: Callable[[bool], object]) -> None:
        self._on_watched = on_watched
        self._changed = threading.Condition()
        self._picture: bytes | None = None
        self._number = 0
        self._watchers = 0
        self._closed = False

    @property
    def watchers(self) -> int:
        """How many watch."""
        with self._changed:
            return self._watchers

    def put(self, picture: bytes | None) -> None:
        """Show a JPEG, or black if there is no picture any more, to everybody."""
        with self._changed:
            if picture is None and self._picture is None:
                return
            self._picture = picture
            self._number += 1
            self._changed.notify_all()

    def frames(self) -> Iterator[bytes]:
        """Yield each new JPEG until the end of the feed. A slow reader misses some.

        Once a second without a new one, the last is repeated, so that a reader that has gone is noticed.
        """
        with self._changed:
            self._watchers += 1
            if self._watchers == 1:
                self._picture = None  # from the last time
                self._on_watched(True)
        try:
            seen = self._number
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._number != seen or self._closed, _REPEAT_S)  # noqa: B023
                    if self._closed:
                        return
                    seen, picture = self._number, self._picture
                yield _black() if picture is None else picture
        finally:
            with self._changed:
                self._watchers -= 1
                if self._watchers == 0:
                    self._on_watched(False)

    def close(self) -> None:
        """End the feed for everybody."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@functools.cache
def _black() -> bytes:
    """Return a black picture."""
    data = io.BytesIO()
    Image.new("L", (320, 240)).save(data, "JPEG")
    return data.getvalue()
