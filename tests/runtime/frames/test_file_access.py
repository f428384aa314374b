"""Access to frame files: missing, special, changing and too large files are one-line errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.errors import FrameReadError, FrameTooLargeError
from echoquad_runtime.frames import file_access
from echoquad_runtime.frames.file_access import open_frame_file, read_bytes, read_head
from echoquad_runtime.frames.formats import HEAD_BYTES

DATA = bytes(range(200)) * 4
every_access = pytest.mark.parametrize("access", [open_frame_file, read_bytes, read_head])
posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX only")


def test_head_is_the_beginning_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(DATA)
    assert read_head(path) == DATA[:HEAD_BYTES]
    path.write_bytes(b"short")
    assert read_head(path) == b"short"


@every_access
def test_missing_file_is_frame_read_error(access: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path, Path("a\0b.png"), tmp_path / ("x" * 300)):
        with pytest.raises(FrameReadError) as caught:
            access(path)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, OSError)


@posix_only
@every_access
@pytest.mark.timeout(10)
def test_pipe_is_refused_without_waiting(access: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "frame.png")
    with pytest.raises(FrameReadError, match="it is no regular file"):
        access(tmp_path / "frame.png")


@posix_only
@pytest.mark.timeout(10)
def test_pipe_that_replaces_file_is_refused_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(DATA)
    opened = os.open

    def open_late(name: Any, *options: Any) -> int:
        path.unlink()
        os.mkfifo(path)
        return opened(name, *options)

    monkeypatch.setattr(os, "open", open_late)
    with pytest.raises(FrameReadError, match="it is no regular file"):
        read_bytes(path)


@pytest.mark.parametrize("change", [-1, -40, 1, 5000])
def test_file_that_changes_size_while_read_is_refused(
    change: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(DATA)
    fstat, status = os.fstat, path.stat()

    def change_file(descriptor: int) -> os.stat_result:
        fstat(descriptor)
        path.write_bytes((DATA + bytes(5000))[: len(DATA) + change])
        return status

    monkeypatch.setattr(os, "fstat", change_file)
    with pytest.raises(FrameReadError, match=f"from {len(DATA)} bytes"):
        read_bytes(path)


@posix_only
def test_file_removed_after_opening_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(DATA)
    fstat = os.fstat

    def remove_file(descriptor: int) -> os.stat_result:
        path.unlink(missing_ok=True)
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", remove_file)
    assert read_bytes(path) == DATA
    with pytest.raises(FrameReadError, match="No such file"):
        read_bytes(path)


@posix_only
@every_access
def test_link_to_itself_is_refused(access: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("a.png")
    with pytest.raises(FrameReadError, match="cannot be read"):
        access(tmp_path / "a.png")


def test_file_above_size_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frame.png"
    path.write_bytes(DATA)
    size = path.stat().st_size
    monkeypatch.setattr(file_access, "MAX_FILE_BYTES", size)
    assert read_bytes(path) == path.read_bytes()
    monkeypatch.setattr(file_access, "MAX_FILE_BYTES", size - 1)
    with pytest.raises(FrameTooLargeError, match=rf"\b{size} bytes.*\b{size - 1}\b"):
        read_bytes(path)
