"""A network share that can hang and break: a FUSE file system in a process of its own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Share:
    """`mount` shows what is in `server`, as long as the process of the file system answers."""

    def __init__(self, folder: Path) -> None:
        self.server, self.mount = folder / "server", folder / "mount"
        self.server.mkdir()
        self.mount.mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def connect(self) -> None:
        # Without caches of names and attributes, which would answer in the place of the server.
        times = "attr_timeout=0,entry_timeout=0,negative_timeout=0"
        self._process = subprocess.Popen(
            ["bindfs", "-f", "-o", times, str(self.server), str(self.mount)], stderr=subprocess.PIPE
        )
        for _ in range(200):
            if self.mount.is_mount():
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        pytest.skip("FUSE file systems cannot be mounted here")

    def hang(self) -> None:
        """Stop to answer: calls block."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def disconnect(self) -> None:
        """Break: calls fail with "Transport endpoint is not connected", until `reconnect`."""
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def reconnect(self) -> None:
        self.unmount()
        self.connect()

    def unmount(self) -> None:
        subprocess.run(["fusermount", "-u", "-z", str(self.mount)], check=False, capture_output=True)


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Share]:
    if shutil.which("bindfs") is None:
        pytest.skip("needs Debian's bindfs")
    folder = tmp_path / "share"
    folder.mkdir()
    made = Share(folder)
    try:
        made.connect()
        yield made
    finally:
        if made._process is not None:
            made.disconnect()
        made.unmount()
