"""The watched folder on a share that hangs, breaks, and comes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_serve.config import FolderIntakeConfig, StoreConfig
from echoquad_serve.intake.watched_folder import WatchedFolder
from echoquad_serve.queue import JobStore


def wait_until(condition: Callable[[], object], timeout: float = 60.0) -> float:
    """Wait until a condition is true, and return the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + timeout, "the condition has not come true"
        time.sleep(0.01)
    return time.monotonic() - began


@pytest.mark.parametrize("after", [pytest.param("leave", marks=pytest.mark.slow), "move"])
def test_a_share_that_hangs_and_breaks_loses_nothing(tmp_path: Path, share: Any, after: Any) -> None:
    store = JobStore(StoreConfig(folder=tmp_path / "store", min_free_mb=0))
    config = FolderIntakeConfig(share.mount, poll_s=0.5, after=after)
    watched = WatchedFolder(config, store.accept, store.incoming, store.check_room)
    watched.start()

    def waiting() -> int:
        return int(store.status()["waiting"])

    (share.server / "1.png").write_bytes(b"one")
    wait_until(lambda: waiting() == 1)

    share.hang()
    assert wait_until(lambda: watched.status()["state"] == "blocked") < 2.0
    (share.server / "2.png").write_bytes(b"two")
    time.sleep(0.5)
    assert waiting() == 1
    share.go_on()
    wait_until(lambda: waiting() == 2 and watched.status()["ok"])

    share.disconnect()
    assert wait_until(lambda: watched.status()["state"] == "unreachable") < 2.0
    (share.server / "3.png").write_bytes(b"three")
    share.reconnect()
    wait_until(lambda: waiting() == 3 and watched.status()["ok"])
    assert [job.path.read_bytes() for job in store.take(5, 0)] == [b"one", b"two", b"three"]

    share.hang()
    wait_until(lambda: watched.status()["state"] == "blocked")
    began = time.monotonic()
    watched.close()
    assert time.monotonic() - began < 2.0
    share.go_on()
    wait_until(lambda: not watched._thread.is_alive())
    store.close()
