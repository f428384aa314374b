"""What the service tells systemd: that it is ready, what it does, and that it does not hang (sd_notify(3))."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

__all__ = ["feed_watchdog", "notify_systemd", "watchdog_interval_s"]

logger = logging.getLogger(__name__)

_MIN_INTERVAL_S: Final = 0.05


def notify_systemd(*states: str) -> None:
    """Send states to systemd, all in one message, if it has started this process.

    The call never waits: a full socket loses the message, as sd_notify(3) allows.

    Parameters
    ----------
    states
        Assignments such as ``READY=1`` or ``STATUS=stopping``, each of one line.
    """
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            sender.send("\n".join(" ".join(state.splitlines()) for state in states).encode("utf-8", "replace"))


def watchdog_interval_s() -> float | None:
    """Return half of the time in seconds after which systemd restarts a silent service; None without a watchdog."""
    try:
        limit_us = int(os.environ.get("WATCHDOG_USEC", ""))
        process = int(os.environ.get("WATCHDOG_PID", "") or os.getpid())
    except ValueError:
        return None
    if limit_us <= 0 or process != os.getpid():  # the variables are inherited: they may be meant for a parent
        return None
    return max(limit_us / 2e6, _MIN_INTERVAL_S)


async def feed_watchdog(hang_reason: Callable[[], str | None]) -> None:
    """Send systemd twice per watchdog period that the service works, until cancelled; return at once without one.

    The message comes from the event loop, so that none comes when the loop does not turn. While `hang_reason` names a
    reason, none is sent, and systemd restarts the service at the end of the period.

    Parameters
    ----------
    hang_reason
        Returns why the service has to be restarted, or None if it works. It must not wait.
    """
    interval = watchdog_interval_s()
    if interval is None:
        return
    logged = ""
    while True:
        reason = hang_reason()
        if reason is None:
            notify_systemd("WATCHDOG=1")
            logged = ""
        elif reason != logged:
            logger.error("the service hangs, and the watchdog is not told otherwise: %s", reason)
            notify_systemd(f"STATUS=hangs: {reason}")
            logged = reason
        await asyncio.sleep(interval)
