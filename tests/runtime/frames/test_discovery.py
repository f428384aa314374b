"""Discovery of frames: folders, patterns, names, links, and inputs without frames."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from echoquad_runtime.errors import InputNotFoundError
from echoquad_runtime.frames.discovery import find_frames, walk
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.storage import directory_walk
from echoquad_runtime.storage.system_files import SkippedEntries

posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX only")


def lay(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def found_names(given: Sequence[str | Path]) -> list[str]:
    found = list(find_frames(given))
    assert all(isinstance(item, FrameFile) for item in found), found
    return [item.name for item in found if isinstance(item, FrameFile)]


def failures(given: Sequence[str | Path]) -> list[tuple[str, str]]:
    return [(item.file, str(item.error)) for item in find_frames(given) if isinstance(item, Failure)]


# ---------------------------------------------------------------------------------------------- folders


def test_folder_is_walked_in_order_for_frames_only(tmp_path: Path) -> None:
    lay(tmp_path, "b/2.png", "b/10.jpg", "a.TIF", "c.bmp", "d.jpeg", "e.tiff", "z.txt", "Thumbs.db", "b/notes.csv")
    assert found_names([tmp_path]) == ["a.TIF", "b/10.jpg", "b/2.png", "c.bmp", "d.jpeg", "e.tiff"]


def test_hidden_names_are_skipped(tmp_path: Path) -> None:
    lay(tmp_path, "a.png", "._a.png", ".cache/b.png", ".c.png")
    assert found_names([tmp_path]) == ["a.png"]
    assert found_names([tmp_path / ".c.png"]) == [".c.png"]  # unless they are named explicitly


def test_names_are_relative_to_the_deepest_common_folder(tmp_path: Path) -> None:
    lay(tmp_path, "test/ASD/1.png", "test/NORM/2.png")
    assert found_names([tmp_path / "test"]) == ["ASD/1.png", "NORM/2.png"]
    assert found_names([tmp_path / "test" / "ASD", tmp_path / "test" / "NORM"]) == ["ASD/1.png", "NORM/2.png"]
    assert found_names([tmp_path / "test" / "NORM", tmp_path / "test" / "ASD" / "1.png"]) == ["NORM/2.png", "ASD/1.png"]
    assert found_names([tmp_path / "test" / "ASD" / "1.png"]) == ["1.png"]


def test_relative_input_has_the_same_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "in/a/1.png", "in/2.png")
    monkeypatch.chdir(tmp_path)
    assert found_names(["in"]) == found_names([tmp_path / "in"]) == ["2.png", "a/1.png"]
    assert found_names(["."]) == ["in/2.png", "in/a/1.png"]
    assert found_names(["in/2.png", "in/a"]) == ["2.png", "a/1.png"]


@posix_only
def test_parent_folders_in_inputs_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/x.png", "b/x.png", "deep/er/y.png", "deep/z.png")
    monkeypatch.chdir(tmp_path / "b")
    assert found_names(["../a/x.png", "x.png"]) == ["a/x.png", "b/x.png"]
    assert found_names(["../a/../b", tmp_path / "a" / "x.png"]) == ["b/x.png", "a/x.png"]
    assert found_names(["../a"]) == ["x.png"]
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    # As the system opens it, "link/.." is the folder above the target.
    assert found_names(["../link/../z.png", "../a/x.png"]) == ["deep/z.png", "a/x.png"]
    assert found_names(["../link/y.png", "../a/x.png"]) == ["link/y.png", "a/x.png"]


def test_system_files_are_skipped_and_counted(tmp_path: Path) -> None:
    names = ["@eaDir/1.png", "b/__MACOSX/2.png", "b/.thumbnails/3.png", "System Volume Information/4.png"]
    lay(tmp_path, "b/x.png", "Thumbs.db", ".DS_Store", "._x.png", "$RECYCLE.BIN/5.png", ".git/6.png", *names)
    skipped = SkippedEntries()
    assert [item.name for item in find_frames([tmp_path], skipped=skipped) if isinstance(item, FrameFile)] == [
        "b/x.png"
    ]
    assert skipped.total == 9
    assert found_names([f"{tmp_path}/**/*.png"]) == ["x.png"]
    assert found_names([f"{tmp_path}/*/x.png", f"{tmp_path}/@eaDir/*.png"]) == ["b/x.png", "@eaDir/1.png"]
    assert found_names([tmp_path / "@eaDir"]) == ["1.png"]  # the only input is meant
    skipped = SkippedEntries()
    given = [tmp_path / name for name in ("@eaDir", "Thumbs.db", "b")]  # as the shell expands folder/*
    (frame,) = find_frames(given, skipped=skipped)
    assert isinstance(frame, FrameFile) and frame.name == "x.png"
    assert skipped.counts == {"@eaDir": 1, "Thumbs.db": 1, "__MACOSX": 1, ".thumbnails": 1}


def test_input_given_twice_is_found_twice(tmp_path: Path) -> None:
    lay(tmp_path, "a.png")
    assert found_names([tmp_path, tmp_path]) == ["a.png", "a.png"]


def test_folder_without_frames_is_a_failure(tmp_path: Path) -> None:
    lay(tmp_path, "notes.doc")
    ((file, message),) = failures([tmp_path])
    assert file == tmp_path.as_posix()
    assert ".bmp, .jpeg, .jpg, .png, .tif, .tiff files, DICOM or clips" in message


def test_unreadable_folder_is_a_failure_and_the_rest_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/1.png", "b/2.png", "c/3.png")
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(directory_walk.os, "scandir", refuse)
    found = list(find_frames([tmp_path]))
    assert [item.name for item in found if isinstance(item, FrameFile)] == ["a/1.png", "c/3.png"]
    for inputs in ([tmp_path], [tmp_path / "b"]):
        ((file, message),) = failures(inputs)
        assert file == (tmp_path / "b").as_posix() and "(Permission denied)" in message
    assert [path.name for path in walk(tmp_path)] == ["1.png", "3.png"]


@posix_only
@pytest.mark.timeout(20)
def test_links_are_followed_without_loops(tmp_path: Path) -> None:
    data = lay(tmp_path / "data", "a/1.png")
    lay(tmp_path / "elsewhere", "2.png")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "a" / "up").symlink_to(data)  # a loop
    (data / "self").symlink_to("self")
    (data / "self.png").symlink_to("self.png")
    (data / "gone.png").symlink_to("nowhere")
    # A broken link is still a frame that was expected; reading it reports what is wrong.
    assert found_names([data]) == ["a/1.png", "gone.png", "linked/2.png", "self.png"]


# ---------------------------------------------------------------------------------------------- files and patterns


def test_explicit_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    lay(tmp_path, "frame", "scan.dat")
    assert found_names([tmp_path / "frame", tmp_path / "scan.dat"]) == ["frame", "scan.dat"]


def test_patterns_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/c/3.png", "a/x.txt")
    monkeypatch.chdir(tmp_path)
    assert found_names(["*/1.png"]) == ["a/1.png", "b/1.png"]
    assert found_names(["a/[12].png"]) == ["1.png", "2.png"]
    assert found_names(["a/?.png"]) == ["1.png", "2.png"]
    assert found_names(["**/*.png"]) == ["a/1.png", "a/2.png", "b/1.png", "b/c/3.png"]
    assert found_names([str(tmp_path / "b" / "**" / "*.png")]) == ["1.png", "c/3.png"]
    assert found_names(["*"]) == ["a/1.png", "a/2.png", "b/1.png", "b/c/3.png"]
    assert found_names(["**"]) == ["a/1.png", "a/2.png", "b/1.png", "b/c/3.png"]  # each once


def test_pattern_has_the_order_of_a_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/1.png", "a-b/1.png", "a.png", "b/a/2.png")
    monkeypatch.chdir(tmp_path)
    assert found_names(["**/*.png"]) == found_names(["."]) == ["a/1.png", "a-b/1.png", "a.png", "b/a/2.png"]


def test_folder_that_a_pattern_cannot_search_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if Path(folder).name == "a":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(directory_walk.os, "scandir", refuse)
    failure, frame = find_frames([f"{tmp_path}/*/*.png"])
    assert isinstance(frame, FrameFile)
    assert frame.name == "2.png"
    assert isinstance(failure, Failure)
    assert failure.file == (tmp_path / "a").as_posix()
    assert "(Permission denied)" in str(failure.error)


def test_existing_name_that_looks_like_a_pattern_is_a_name(tmp_path: Path) -> None:
    lay(tmp_path, "a[1].png", "a1.png")
    assert found_names([tmp_path / "a[1].png"]) == ["a[1].png"]


def test_input_that_names_nothing_is_a_failure_beside_the_others(tmp_path: Path) -> None:
    lay(tmp_path, "a.png")
    found = list(find_frames([tmp_path / "absent.png", tmp_path / "a.png", f"{tmp_path}/*.jpg"]))
    assert [type(item) for item in found] == [Failure, FrameFile, Failure]
    ((file, message),) = failures([tmp_path / "absent.png"])
    assert file == (tmp_path / "absent.png").as_posix() and "no such file" in message
    assert "pattern" in failures([f"{tmp_path}/*.jpg"])[0][1]
    assert isinstance(found[0], Failure)
    assert isinstance(found[0].error, InputNotFoundError)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b.png", "a/b/c/d.png"], ids=["long", "null", "deep"])
def test_invalid_names_are_failures(name: str) -> None:
    ((file, message),) = failures([name])
    assert file == name and "no such file" in message


@posix_only
def test_names_may_have_any_bytes(tmp_path: Path) -> None:
    names = [os.fsdecode(name) for name in (b"a\xff.png", "é.png".encode(), b"new\nline.png", b'"quoted".png')]
    try:
        lay(tmp_path, *names)
    except OSError:
        pytest.skip("this file system accepts UTF-8 only")
    assert sorted(found_names([tmp_path])) == sorted(names)


@posix_only
def test_pipes_and_sockets_are_found_by_name_without_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    lay(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        assert found_names([tmp_path]) == [
            "a.png",
            "pipe.png",
            "socket.png",
        ]  # reading the last two reports what they are


def test_no_inputs_yield_no_frames() -> None:
    assert list(find_frames([])) == []


def test_frames_are_found_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/1.png", "b/2.png")
    frames = find_frames([tmp_path])
    assert next(frames).name == "a/1.png"  # type: ignore[union-attr]
    monkeypatch.setattr(directory_walk.os, "scandir", lambda _: pytest.fail("the whole folder had been walked"))
    with pytest.raises(pytest.fail.Exception):
        next(frames)
