"""Directory walks and glob patterns: order, links, depth, unreadable folders, and memory."""

from __future__ import annotations

import errno
import glob
import inspect
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.storage import directory_walk
from echoquad_runtime.storage.directory_walk import expand_pattern, walk_directory

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
    return list(walk_directory(os.fspath(folder), True, everything))


# ---------------------------------------------------------------------------------------------- walk_directory


def test_files_and_folders_are_walked_in_one_order(tmp_path: Path) -> None:
    lay(tmp_path, "b/2", "b-c/1", "b.x", "a", "b/1/z", "c/d/e/f", "b0")
    assert names(tmp_path) == ["a", "b/1/z", "b/2", "b-c/1", "b.x", "b0", "c/d/e/f"]


def test_yielded_folder_is_not_entered(tmp_path: Path) -> None:
    lay(tmp_path, "a/1", "b/1")
    found = walk_directory(str(tmp_path), True, lambda _, name, is_folder: (name in "a1", is_folder or None))
    assert list(found) == ["a", "b/1"]


@posix_only
@pytest.mark.timeout(20)
def test_links_to_parent_folders_are_not_entered(tmp_path: Path) -> None:
    lay(tmp_path, "a/b/1", "other/2")
    for index in range(12):  # following every path through the links would not end
        (tmp_path / "a" / f"up{index}").symlink_to(tmp_path)
        (tmp_path / "a" / "b" / f"up{index}").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "twice").symlink_to(tmp_path / "other")  # not a loop: one folder by two paths
    assert names(tmp_path) == ["a/b/1", "a/twice/2", "other/2"]


@pytest.mark.parametrize("named", [True, False])
def test_error_while_listing_is_yielded_after_the_names_so_far(
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
        directory_walk.os, "scandir", lambda folder: Broken(folder) if Path(folder).name == "b" else scandir(folder)
    )
    first, error, second, third = names(tmp_path)
    assert (first, third) == ("a/1", "c/4")
    assert second in ("b/2", "b/3")
    assert isinstance(error, OSError)
    assert Path(error.filename) == tmp_path / "b"


@posix_only
def test_walk_is_not_limited_by_recursion(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(200):
        folder = folder / "d"
        folder.mkdir()
    (folder / "1.png").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 60)
    try:
        assert names(tmp_path) == ["d/" * 200 + "1.png"]
    finally:
        sys.setrecursionlimit(limit)


@posix_only
def test_too_long_path_is_an_error_and_the_rest_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_name = "d" * 200
    monkeypatch.chdir(tmp_path)
    for depth in range(25):  # 5,000 characters; the system accepts 4,096
        Path(long_name).mkdir()
        os.chdir(long_name)
        if depth in (10, 24):
            Path(f"{depth}.png").touch()
    os.chdir(tmp_path)
    expected = f"{long_name}/" * 11 + "10.png"
    found, error = names(Path())
    assert found == expected
    assert isinstance(error, OSError)
    assert error.errno == errno.ENAMETOOLONG
    assert error.filename.startswith(f"./{long_name}/")
    frame, failure = find_frames(["."])
    assert isinstance(frame, FrameFile)
    assert isinstance(failure, Failure)
    assert frame.name == expected
    assert frame.path.exists()
    assert "(File name too long)" in str(failure.error)


def test_memory_holds_only_the_names_of_one_folder(tmp_path: Path) -> None:
    for index in range(1500):
        (tmp_path / f"frame-of-a-patient-{index:06d}.png").touch()
    tracemalloc.start()
    found = walk_directory(str(tmp_path), True, everything)
    next(found)
    held, _ = tracemalloc.get_traced_memory()
    for _ in found:
        pass
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1500 * 120, "a name has 75 bytes; a Path or a DirEntry would have several times that"
    assert after < 20_000, "yielded names are released"


# ---------------------------------------------------------------------------------------------- expand_pattern

PATTERNS = ["*", "*/1.png", "a/?.png", "a/[!1].png", "**/*.png", "**/c/*", "*/c/3.png", ".*/*.png", "**/.h/*"]
PATTERNS += ["[a-b]/*", "*.jpg", "a*/", "nothing/*", "**/**/3.png", "b/**/3.png", "*/*/*/*"]
FILES = ["a/1.png", "a/2.png", "a-b/1.png", "b/1.png", "b/c/3.png", "a/x.txt", ".h/1.png", "b/.h/1.png", "1.png"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absolute", [True, False])
def test_pattern_matches_what_glob_matches(
    pattern: str, absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, *FILES)
    monkeypatch.chdir(tmp_path)
    given = f"{tmp_path}{os.sep}{pattern}" if absolute else pattern
    expected = {path.rstrip(os.sep) for path in glob.glob(given, recursive=True)}  # noqa: PTH207 - the reference
    # A matching folder stands for its content.
    expected = {path for path in expected if not any(path.startswith(other + os.sep) for other in expected)}
    found = [os.fspath(path) for path in expand_pattern(given) if isinstance(path, str)]
    assert sorted(found) == sorted(expected)
    assert found == sorted(found, key=lambda path: Path(path).parts)


def test_recursive_pattern_alone_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/1.png", "a/b/2.png")
    assert list(expand_pattern(f"{tmp_path}/a/**")) == [str(tmp_path / "a")]
    monkeypatch.chdir(tmp_path)
    assert list(expand_pattern("**")) == ["."]


@posix_only
@pytest.mark.timeout(20)
def test_pattern_does_not_follow_link_loops(tmp_path: Path) -> None:
    lay(tmp_path, "a/1.png", "b/2.png")
    for index in range(3):  # glob follows each of these loops up to forty times
        (tmp_path / "a" / f"loop{index}").symlink_to(tmp_path)
    found = list(expand_pattern(f"{tmp_path}/**/*.png"))
    assert found == [str(tmp_path / name) for name in ("a/1.png", "b/2.png")]
