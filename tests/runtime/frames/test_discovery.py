from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from echoquad_runtime.errors import InputNotFoundError
from echoquad_runtime.frames.discovery import find_frames, walk
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.storage import directory_walk as tree

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


def test_a_folder_is_walked_in_order_for_images_alone(tmp_path: Path) -> None:
    lay(tmp_path, "b/2.png", "b/10.jpg", "a.TIF", "c.bmp", "d.jpeg", "e.tiff", "z.txt", "Thumbs.db", "b/notes.csv")
    assert found_names([tmp_path]) == ["a.TIF", "b/10.jpg", "b/2.png", "c.bmp", "d.jpeg", "e.tiff"]


def test_hidden_names_are_left_out(tmp_path: Path) -> None:
    lay(tmp_path, "a.png", "._a.png", ".cache/b.png", ".c.png")
    assert found_names([tmp_path]) == ["a.png"]
    assert found_names([tmp_path / ".c.png"]) == [".c.png"]  # but not when they are named outright


def test_names_are_relative_to_the_one_folder_or_to_the_deepest_common_one(tmp_path: Path) -> None:
    lay(tmp_path, "test/ASD/1.png", "test/NORM/2.png")
    assert found_names([tmp_path / "test"]) == ["ASD/1.png", "NORM/2.png"]
    assert found_names([tmp_path / "test" / "ASD", tmp_path / "test" / "NORM"]) == ["ASD/1.png", "NORM/2.png"]
    assert found_names([tmp_path / "test" / "NORM", tmp_path / "test" / "ASD" / "1.png"]) == ["NORM/2.png", "ASD/1.png"]
    assert found_names([tmp_path / "test" / "ASD" / "1.png"]) == ["1.png"]


def test_a_relative_input_is_named_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "in/a/1.png", "in/2.png")
    monkeypatch.chdir(tmp_path)
    assert found_names(["in"]) == found_names([tmp_path / "in"]) == ["2.png", "a/1.png"]
    assert found_names(["."]) == ["in/2.png", "in/a/1.png"]
    assert found_names(["in/2.png", "in/a"]) == ["2.png", "a/1.png"]


def test_an_input_given_twice_is_judged_twice(tmp_path: Path) -> None:
    lay(tmp_path, "a.png")
    assert found_names([tmp_path, tmp_path]) == ["a.png", "a.png"]


def test_an_empty_folder_is_a_failure(tmp_path: Path) -> None:
    lay(tmp_path, "notes.doc")
    ((file, message),) = failures([tmp_path])
    assert file == tmp_path.as_posix()
    assert message == "the folder holds no image; expected .bmp, .jpeg, .jpg, .png, .tif, .tiff files, DICOM or clips"


def test_a_folder_that_cannot_be_read_is_told_and_the_rest_is_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, "a/1.png", "b/2.png", "c/3.png")
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(tree.os, "scandir", refuse)
    found = list(find_frames([tmp_path]))
    assert [item.name for item in found if isinstance(item, FrameFile)] == ["a/1.png", "c/3.png"]
    assert failures([tmp_path]) == [
        ((tmp_path / "b").as_posix(), "the folder cannot be read (Permission denied); check its permissions")
    ]
    assert failures([tmp_path / "b"])[0][1].startswith("the folder cannot be read")
    assert [path.name for path in walk(tmp_path)] == ["1.png", "3.png"]


@posix_only
@pytest.mark.timeout(20)
def test_links(tmp_path: Path) -> None:
    data = lay(tmp_path / "data", "a/1.png")
    lay(tmp_path / "elsewhere", "2.png")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "a" / "up").symlink_to(data)  # a loop
    (data / "self").symlink_to("self")
    (data / "self.png").symlink_to("self.png")
    (data / "gone.png").symlink_to("nowhere")
    # A link that leads nowhere is still a frame that was there to be judged: reading it will say what is wrong.
    assert found_names([data]) == ["a/1.png", "gone.png", "linked/2.png", "self.png"]


# ---------------------------------------------------------------------------------------------- files and patterns


def test_a_file_named_outright_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    lay(tmp_path, "frame", "scan.dat")
    assert found_names([tmp_path / "frame", tmp_path / "scan.dat"]) == ["frame", "scan.dat"]


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/c/3.png", "a/x.txt")
    monkeypatch.chdir(tmp_path)
    assert found_names(["*/1.png"]) == ["a/1.png", "b/1.png"]
    assert found_names(["a/[12].png"]) == ["1.png", "2.png"]
    assert found_names(["a/?.png"]) == ["1.png", "2.png"]
    assert found_names(["**/*.png"]) == ["a/1.png", "a/2.png", "b/1.png", "b/c/3.png"]
    assert found_names([str(tmp_path / "b" / "**" / "*.png")]) == ["1.png", "c/3.png"]
    assert found_names(["*"]) == ["a/1.png", "a/2.png", "b/1.png", "b/c/3.png"]
    assert found_names(["**"]) == ["a/1.png", "a/2.png", "b/1.png", "b/c/3.png"]  # each once


def test_a_pattern_has_the_order_of_a_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/1.png", "a-b/1.png", "a.png", "b/a/2.png")
    monkeypatch.chdir(tmp_path)
    assert found_names(["**/*.png"]) == found_names(["."]) == ["a/1.png", "a-b/1.png", "a.png", "b/a/2.png"]


def test_a_folder_that_a_pattern_cannot_search_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if Path(folder).name == "a":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(tree.os, "scandir", refuse)
    failure, frame = find_frames([f"{tmp_path}/*/*.png"])
    assert isinstance(frame, FrameFile)
    assert frame.name == "2.png"
    assert isinstance(failure, Failure)
    assert failure.file == (tmp_path / "a").as_posix()
    assert str(failure.error) == "the folder cannot be read (Permission denied); check its permissions"


def test_a_name_that_looks_like_a_pattern_is_a_name_first(tmp_path: Path) -> None:
    lay(tmp_path, "a[1].png", "a1.png")
    assert found_names([tmp_path / "a[1].png"]) == ["a[1].png"]


def test_what_names_nothing_is_a_failure_beside_the_others(tmp_path: Path) -> None:
    lay(tmp_path, "a.png")
    found = list(find_frames([tmp_path / "absent.png", tmp_path / "a.png", f"{tmp_path}/*.jpg"]))
    assert [type(item) for item in found] == [Failure, FrameFile, Failure]
    assert failures([tmp_path / "absent.png"]) == [
        ((tmp_path / "absent.png").as_posix(), "no such file or folder; check the path")
    ]
    assert failures([f"{tmp_path}/*.jpg"])[0][1] == "no file matches the pattern; check it"
    assert isinstance(found[0], Failure)
    assert isinstance(found[0].error, InputNotFoundError)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b.png", "a/b/c/d.png"], ids=["long", "null", "deep"])
def test_names_that_cannot_be_are_failures(name: str) -> None:
    assert failures([name]) == [(name, "no such file or folder; check the path")]


@posix_only
def test_any_bytes_are_a_name(tmp_path: Path) -> None:
    names = [os.fsdecode(name) for name in (b"a\xff.png", "é.png".encode(), b"new\nline.png", b'"quoted".png')]
    try:
        lay(tmp_path, *names)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    assert sorted(found_names([tmp_path])) == sorted(names)


@posix_only
def test_what_is_no_file_is_found_by_its_name_and_opened_by_no_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path has to be short
    lay(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        assert found_names([tmp_path]) == ["a.png", "pipe.png", "socket.png"]  # reading the last two will say why not


def test_no_inputs() -> None:
    assert list(find_frames([])) == []


def test_frames_are_found_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "a/1.png", "b/2.png")
    frames = find_frames([tmp_path])
    assert next(frames).name == "a/1.png"  # type: ignore[union-attr]
    monkeypatch.setattr(tree.os, "scandir", lambda _: pytest.fail("it had been walked to its end"))
    with pytest.raises(pytest.fail.Exception):
        next(frames)
