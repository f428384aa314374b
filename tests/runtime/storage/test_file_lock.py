"""File locks: one process at a time, released when the process ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from echoquad_runtime.storage import file_lock
from echoquad_runtime.storage.file_lock import FileLock, LockedError


def in_another_process(path: Path) -> str:
    """Try to lock `path` in another process and return what it prints."""
    code = f"""
        from pathlib import Path
        from echoquad_runtime.storage.file_lock import FileLock, LockedError
        try:
            print(FileLock(Path({str(path)!r})).read())
        except LockedError as error:
            print("held", error.filename)
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_only_one_process_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    held = FileLock(path)
    held.write(b"first, and long")
    held.write(b"mine")
    assert held.certain
    assert held.read() == b"mine"
    assert in_another_process(path) == f"held {path}"
    held.release()
    assert in_another_process(path) == "b'mine'"
    again = FileLock(path)
    again.release(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_lock_is_released_when_its_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    imports = "import pathlib; from echoquad_runtime.storage import file_lock"
    code = f"{imports}; it = file_lock.FileLock(pathlib.Path({str(path)!r}))"
    command = [sys.executable, "-c", f"{code}; print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(LockedError):
            FileLock(path)
        process.kill()
    FileLock(path).release()


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot remove an open file")
def test_lock_on_a_removed_file_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    real, calls = file_lock._lock, []

    def removed_by_its_holder(descriptor: int) -> None:
        if not calls:  # between opening and locking
            path.unlink()
        calls.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(file_lock, "_lock", removed_by_its_holder)
    held = FileLock(path)
    assert len(calls) == 2
    assert in_another_process(path) == f"held {path}"
    held.release(remove=True)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_used_and_reported(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_lock, "_lock", refuse)
    held = FileLock(tmp_path / "x.json")
    assert not held.certain
    held.write(b"x")
    held.release(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "absent" / "x.json")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("exists", [True, False])
def test_planted_link_is_not_followed(exists: bool, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    if exists:
        victim.write_text("mine")
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(OSError, match="lock is a symbolic link"):
        FileLock(tmp_path / "lock")
    assert victim.exists() == exists


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_pipe_under_the_name_of_the_lock_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(OSError, match="no regular file"):
        FileLock(tmp_path / "lock")
