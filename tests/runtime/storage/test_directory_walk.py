from __future__ import annotations

import errno
import glob
import os
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.storage import directory_walk as tree
from echoquad_runtime.storage.directory_walk import descend, expand

posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX only")


def lay(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def everything(_: bool, name: str, is_folder: bool) -> tuple[bool, bool | None]:
    return not is_folder, True if is_folder else None


def names(folder: Path) -> list[str | OSError]:
    return list(descend(os.fspath(folder), True, everything))


# ---------------------------------------------------------------------------------------------- descend


def test_files_and_folders_are_gone_through_in_one_order(tmp_path: Path) -> None:
    lay(tmp_path, "b/2", "b-c/1", "b.x", "a", "b/1/z", "c/d/e/f", "b0")
    assert names(tmp_path) == ["a", "b/1/z", "b/2", "b-c/1", "b.x", "b0", "c/d/e/f"]


def test_what_is_given_is_not_entered(tmp_path: Path) -> None:
    lay(tmp_path, "a/1", "b/1")
    found = descend(str(tmp_path), True, lambda _, name, is_folder: (name in "a1", is_folder or None))
    assert list(found) == ["a", "b/1"]


@posix_only
@pytest.mark.timeout(20)
def test_links_to_folders_above_are_not_entered_however_many(tmp_path: Path) -> None:
    lay(tmp_path, "a/b/1", "other/2")
    for index in range(12):  # each way round all the others would take longer than there is time
        (tmp_path / "a" / f"up{index}").symlink_to(tmp_path)
        (tmp_path / "a" / "b" / f"up{index}").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "twice").symlink_to(tmp_path / "other")  # no loop: the same folder by two ways
    assert names(tmp_path) == ["a/b/1", "a/twice/2", "other/2"]


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_that_breaks_off_is_told_and_its_names_are_given(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, "a/1", "b/2", "b/3", "c/4")
    scandir = os.scandir

    class Broken:
        def __init__(self, folder: str) -> None:
            self._entries, self._folder = scandir(folder), folder

        def __enter__(self) -> Any:
            yield next(self._entries)
            raise OSError(errno.EIO, "Input/output error", *([self._folder] if named else []))

        def __exit__(self, *_: object) -> None:
            self._entries.close()

    monkeypatch.setattr(
        tree.os, "scandir", lambda folder: Broken(folder) if Path(folder).name == "b" else scandir(folder)
    )
    first, error, second, third = names(tmp_path)
    assert (first, third) == ("a/1", "c/4")
    assert second in ("b/2", "b/3")
    assert isinstance(error, OSError)
    assert Path(error.filename) == tmp_path / "b"


@pytest.fixture
def depths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a folder of a file below 1,500 folders, and another below 2,600: a longer path than the system takes."""
    monkeypatch.chdir(tmp_path)
    try:
        for depth in range(1, 2601):
            Path("d").mkdir()
            os.chdir("d")
            if depth in (1500, 2600):
                Path(f"{depth}.png").touch()
        os.chdir(tmp_path)
        yield tmp_path
    finally:  # Python's own way to remove it goes no deeper than its stack
        os.chdir(tmp_path.parent)
        subprocess.run(["rm", "-rf", tmp_path], check=True)


@posix_only
def test_a_tree_deeper_than_pythons_stack_and_than_a_path_is_long(depths: Path) -> None:
    found, error = names(Path())
    assert found == "d/" * 1500 + "1500.png"
    assert isinstance(error, OSError)
    assert error.errno == errno.ENAMETOOLONG
    assert error.filename.startswith("./d/d/d/")
    walked = find_frames(["."])
    frame, failure = walked
    assert isinstance(frame, FrameFile)
    assert isinstance(failure, Failure)
    assert frame.name == found
    assert frame.path.exists()
    assert "the folder cannot be read (File name too long)" in str(failure.error)


def test_no_more_is_held_than_the_names_of_a_folder(tmp_path: Path) -> None:
    for index in range(4000):
        (tmp_path / f"frame-of-a-patient-{index:06d}.png").touch()
    tracemalloc.start()
    found = descend(str(tmp_path), True, everything)
    next(found)
    held, _ = tracemalloc.get_traced_memory()
    for _ in found:
        pass
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 4000 * 120, "a name has 75 bytes here; a Path or a DirEntry several times that"
    assert after < 50_000, "what was given is let go of"


# ---------------------------------------------------------------------------------------------- expand

PATTERNS = ["*", "*/1.png", "a/?.png", "a/[!1].png", "**/*.png", "**/c/*", "*/c/3.png", ".*/*.png", "**/.h/*"]
PATTERNS += ["[a-b]/*", "*.jpg", "a*/", "nothing/*", "**/**/3.png", "b/**/3.png", "*/*/*/*"]
FILES = ["a/1.png", "a/2.png", "a-b/1.png", "b/1.png", "b/c/3.png", "a/x.txt", ".h/1.png", "b/.h/1.png", "1.png"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_pattern_names_what_pythons_glob_does(
    pattern: str, absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, *FILES)
    monkeypatch.chdir(tmp_path)
    given = f"{tmp_path}{os.sep}{pattern}" if absolute else pattern
    expected = {path.rstrip(os.sep) for path in glob.glob(given, recursive=True)}  # noqa: PTH207 - the reference
    # What lies in a folder that is found is found with it.
    expected = {path for path in expected if not any(path.startswith(other + os.sep) for other in expected)}
    found = [os.fspath(path) for path in expand(given) if isinstance(path, str)]
    assert sorted(found) == sorted(expected)
    assert found == sorted(found, key=lambda path: Path(path).parts)


def test_any_folders_alone_are_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/1.png", "a/b/2.png")
    assert list(expand(f"{tmp_path}/a/**")) == [str(tmp_path / "a")]
    monkeypatch.chdir(tmp_path)
    assert list(expand("**")) == ["."]


@posix_only
@pytest.mark.timeout(20)
def test_a_pattern_ends_where_links_do_not(tmp_path: Path) -> None:
    lay(tmp_path, "a/1.png", "b/2.png")
    for index in range(3):  # Python's own glob goes round these up to forty times, by each of them
        (tmp_path / "a" / f"loop{index}").symlink_to(tmp_path)
    found = list(expand(f"{tmp_path}/**/*.png"))
    assert found == [str(tmp_path / name) for name in ("a/1.png", "b/2.png")]
