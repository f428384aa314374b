from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from echoquad_runtime.storage import file_lock as lock
from echoquad_runtime.storage.file_lock import FileLock, LockedError


def in_another_process(path: Path) -> str:
    """Try to lock `path` in a process of its own; gives what it says."""
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


def test_one_process_at_a_time(tmp_path: Path) -> None:
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


def test_it_is_let_go_when_its_process_is_killed(tmp_path: Path) -> None:
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


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed there")
def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    real, calls = lock._lock, []

    def removed_by_its_holder(descriptor: int) -> None:
        if not calls:  # between opening and locking
            path.unlink()
        calls.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(lock, "_lock", removed_by_its_holder)
    held = FileLock(path)
    assert len(calls) == 2
    assert in_another_process(path) == f"held {path}"
    held.release(remove=True)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_used_and_told(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock, "_lock", refuse)
    held = FileLock(tmp_path / "x.json")
    assert not held.certain
    held.write(b"x")
    held.release(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "absent" / "x.json")
