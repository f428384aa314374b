"""Signals: the first one ends the command in good order, the second one ends the process at once."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Final

__all__ = ["exit_code", "install", "received", "restore_defaults"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_received = 0


def install() -> None:
    """Raise KeyboardInterrupt on the first SIGINT or SIGTERM. A signal that is ignored stays ignored."""
    global _received  # noqa: PLW0603 - signal handlers belong to the process
    _received = 0
    for number in _SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # shells ignore SIGINT in the background
            with contextlib.suppress(ValueError):  # outside the main thread, which alone receives signals
                signal.signal(number, _handle)


def restore_defaults() -> None:
    """Restore the default handlers: after the command has finished, a signal ends the process at once."""
    for number in _SIGNALS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL)


def received() -> bool:
    """Return whether a signal has arrived.

    The exception that ends the command need not be the KeyboardInterrupt: an interrupted wait for a thread may raise an
    error about its lock instead.
    """
    return _received != 0


def exit_code() -> int:
    """Return the exit code that shells use for the signal that arrived: 128 plus its number."""
    return 128 + (_received or signal.SIGINT)


def _handle(number: int, _: FrameType | None) -> None:
    global _received  # noqa: PLW0603
    _received = number
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_DFL)
    raise KeyboardInterrupt
