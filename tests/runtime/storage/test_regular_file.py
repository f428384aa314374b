"""Regular files: bounded reads, and refusal of pipes, devices and folders."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.storage.regular_file import open_regular, read_regular, write_all


@pytest.mark.parametrize("limit", [0, 4, 5, 6, 1 << 40])
def test_read_regular_reads_one_byte_beyond_the_limit(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a\r\nbc")
    assert read_regular(path, limit) == b"a\r\nbc"[: limit + 1]


def test_pipes_devices_and_folders_are_refused_without_waiting(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "absent", 9)
    with pytest.raises(OSError, match=r"no regular file|denied"):
        read_regular(tmp_path, 9)
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", Path("/dev/zero")):
            with pytest.raises(OSError, match="it is no regular file"), open_regular(path):
                pass
        # A refused file is closed.
        before = len(list(Path("/dev/fd").iterdir()))
        for _ in range(5):
            with pytest.raises(OSError, match="it is no regular file"):
                read_regular(tmp_path, 9)
        assert len(list(Path("/dev/fd").iterdir())) == before


def test_write_all_continues_after_partial_writes(tmp_path: Path) -> None:
    class Little(FileIO):
        def write(self, data: Any, /) -> int:
            return super().write(data[:3])

    with Little(tmp_path / "file", "w") as stream:
        write_all(stream, b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"
