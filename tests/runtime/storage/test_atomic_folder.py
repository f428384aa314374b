"""Atomic folders: complete or absent, one writer at a time, and an older folder stays until the new one is complete."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from echoquad_runtime.errors import FrameReadError, OutputError
from echoquad_runtime.storage import atomic_folder as atomic_folder_module
from echoquad_runtime.storage import file_lock
from echoquad_runtime.storage.atomic_folder import atomic_folder

links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def build(target: Path, *, replace: bool = False) -> None:
    with atomic_folder(target, replace=replace) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("new")


@pytest.mark.parametrize("exists", [True, False])
def test_folder_appears_complete_at_the_end(exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "parent" / "data"
    if exists:
        target.mkdir(parents=True)
    with atomic_folder(target) as folder:
        assert folder.name == "data"  # a signature records the name
        (folder / "file").write_text("new")
        assert not target.exists() or not any(target.iterdir())
        assert (target.parent / "data.partial").is_dir()
    assert tree(tmp_path) == {"parent/data/file": "new"}
    assert os.listdir(target.parent) == ["data"]  # noqa: PTH208


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, FrameReadError])
@pytest.mark.parametrize("replace", [True, False])
def test_failed_block_leaves_the_target_unchanged(error: type[BaseException], replace: bool, tmp_path: Path) -> None:
    target = tmp_path / "data"
    if replace:
        build(target)
    before = tree(tmp_path)
    with pytest.raises(error), atomic_folder(target, replace=replace) as folder:
        (folder / "file").write_text("half")
        raise error("stop")
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["data"] if replace else [])


def test_system_error_in_the_block_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), atomic_folder(tmp_path / "data"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_target_with_entries_is_refused_unless_replaced(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="1 entries"):
        build(target)
    assert tree(target) == {"mine.txt": "keep"}
    build(target, replace=True)
    assert tree(tmp_path) == {"data/inner/file": "new"}
    with pytest.raises(OutputError, match="is a file"):
        build(target / "inner" / "file")


def test_target_that_is_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.mkdir()
    with pytest.raises(OutputError), atomic_folder(target):
        (target / "mine.txt").write_text("keep")
    assert tree(tmp_path) == {"data/mine.txt": "keep"}


def test_second_writer_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "data"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(OutputError, match=r"another process is writing .*data\.partial"):
            build(target)
    assert tree(target) == {"file": "first"}


def test_folder_of_a_killed_writer_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / "data.partial" / "data"
    left.mkdir(parents=True)
    (left / "half").write_text("old")
    (left.parent / "lock").touch()
    build(tmp_path / "data")
    assert tree(tmp_path) == {"data/inner/file": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_unfinished_folder_is_kept_where_nothing_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_lock, "_lock", refuse)
    build(tmp_path / "first")
    (tmp_path / "data.partial" / "data").mkdir(parents=True)
    with pytest.raises(OutputError, match="has no locks"):
        build(tmp_path / "data")
    assert (tmp_path / "data.partial" / "data").is_dir()


@pytest.mark.parametrize("call", [1, 2])
def test_failed_rename_restores_the_older_folder(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "data"
    build(target)
    before, rename, calls = tree(tmp_path), Path.rename, []

    def refuse(path: Path, to: Path) -> Path:
        calls.append(path)
        if len(calls) == call:
            raise PermissionError(13, "Access is denied")
        return rename(path, to)

    monkeypatch.setattr(atomic_folder_module, "_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="Access is denied"):
        build(target, replace=True)
    assert tree(tmp_path) == before


exchange_only = pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="the system exchanges no folders")


@exchange_only
def test_replaced_folder_is_there_at_every_moment(tmp_path: Path) -> None:
    target = tmp_path / "data"
    build(target)
    missing, polls, stop = 0, 0, threading.Event()

    def poll() -> None:
        nonlocal missing, polls
        while not stop.is_set():
            polls += 1
            missing += not target.is_dir()

    reader = threading.Thread(target=poll)
    reader.start()
    for _ in range(200):
        build(target, replace=True)
    stop.set()
    reader.join()
    assert polls > 200 and missing == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


KILLED = """
    import os
    from pathlib import Path
    from echoquad_runtime.storage import atomic_folder as module

    def killed(*_, **__):
        os._exit(9)

    {patch}
    with module.atomic_folder(Path({target!r}), replace=True) as folder:
        (folder / "file").write_text("new")
        {inside}
"""
MOMENTS = {
    "while it is built": ("", "killed()", "old"),
    "before the exchange": ("module._exchange = killed", "", "old"),
    "after the exchange": ("module.FileLock.release = killed", "", "new"),
    "while the older folder is removed": (
        "real = module.shutil.rmtree; calls = []\n"
        "    module.shutil.rmtree = lambda *a, **o: (calls.append(a), killed() if len(calls) > 2 else real(*a, **o))",
        "",
        "new",
    ),
}


@exchange_only
@pytest.mark.parametrize("moment", MOMENTS)
def test_writer_killed_at_any_moment_leaves_the_old_or_the_new_folder(moment: str, tmp_path: Path) -> None:
    patch, inside, expected = MOMENTS[moment]
    target = tmp_path / "data"
    target.mkdir()
    (target / "file").write_text("old")
    code = textwrap.dedent(KILLED.format(patch=patch, inside=inside, target=str(target)))
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 9
    assert tree(target) == {"file": expected}
    build(target, replace=True)
    assert tree(tmp_path) == {"data/inner/file": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_folder_of_a_writer_killed_between_two_renames_is_restored(tmp_path: Path) -> None:
    replaced = tmp_path / "data.partial" / "data.replaced"
    replaced.mkdir(parents=True)
    (replaced / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "data", replace=True):
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"data/file": "old"}


@links
@pytest.mark.parametrize("planted", ["data.partial", "data.partial/lock"])
def test_planted_link_is_not_followed(planted: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim / "data").mkdir(parents=True)
    (victim / "data" / "file").write_text("mine")
    link = tmp_path / planted
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim if planted == "data.partial" else victim / "data" / "file")
    with pytest.raises(OutputError, match="is a symbolic link"):
        build(tmp_path / "data")
    assert tree(victim) == {"data/file": "mine"}
    assert not (tmp_path / "data").exists()


@links
def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    build(tmp_path / "v1")
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    with atomic_folder(tmp_path / "current", replace=True) as folder:
        (folder / "file").write_text("newer")
    assert (tmp_path / "current").is_symlink()
    assert tree(tmp_path / "v1") == {"file": "newer"}
