"""Signals: the first asks for an end in good order, the second ends at once."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Final

__all__ = ["came", "exit_code", "forget", "listen"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_received = 0


def listen() -> None:
    """Have Ctrl-C and SIGTERM raise a KeyboardInterrupt, once; what is ignored, as in the background, stays so."""
    global _received  # noqa: PLW0603 - a process has one end
    _received = 0
    for number in _SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            with contextlib.suppress(ValueError):  # not in the main thread, which alone is told of signals
                signal.signal(number, _end)


def forget() -> None:
    """Have a signal end the process at once and without a word: what there was to say has been said."""
    for number in _SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)


def came() -> bool:
    """Say whether one has come: what is raised since then need not be the KeyboardInterrupt itself.

    A wait for a thread that it breaks off may complain of its lock in place of it.
    """
    return _received != 0


def exit_code() -> int:
    """Give the exit code that shells have for the signal that came: 128 and its number."""
    return 128 + (_received or signal.SIGINT)


def _end(number: int, _: FrameType | None) -> None:
    global _received  # noqa: PLW0603
    _received = number
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_DFL)
    raise KeyboardInterrupt
