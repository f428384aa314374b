"""Output of ``echoquad predict``: unwritable files, full disks, pipes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

posix_only = pytest.mark.skipif(os.name != "posix", reason="Windows has none of it")
not_root = pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may do everything")
linux_only = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


def test_output_that_cannot_be_written_exits_1(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder.csv").mkdir()
    places = [
        (["--out", tmp_path / "missing" / "out.csv"], "No such file or directory"),
        (["--out", tmp_path / "file" / "out.csv"], "Not a directory"),
        (["--out", tmp_path / "folder.csv"], "folder.csv"),
        (["--out", tmp_path / "out.csv", "--overlay", tmp_path / "file"], "file"),
        (["--out", tmp_path / "out.csv", "--overlay", tmp_path / "file" / "below"], "file/below"),
    ]
    found, _ = many([["predict", tiny_bundle, frames_folder, *options] for options, _ in places])
    for (options, words), ran in zip(places, found, strict=True):
        assert (ran.code, ran.out, ran.error_codes) == (1, "", ["E_OUTPUT"]), options
        if os.name == "posix":  # other systems have other messages
            assert words in ran.errors[0], options
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.csv", "frames"]


@posix_only
@not_root
def test_output_folder_without_permission_exits_1(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    ran = echoquad("predict", tiny_bundle, frames_folder, "--out", tmp_path / "locked" / "out.csv", code=1)
    assert ran.error[0] == "E_OUTPUT" and "Permission denied" in ran.errors[0]


@posix_only
@not_root
def test_inputs_without_permission_are_failures(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    (frames_folder / "a").chmod(0)
    (frames_folder / "b" / "5.png").chmod(0)
    ran = echoquad("predict", tiny_bundle, frames_folder, "--out", tmp_path / "out.csv", code=5)
    (frames_folder / "a").chmod(0o700)
    folder, file = ran.errors
    assert ran.error_codes[1] == "E_FRAME_UNREADABLE"
    assert folder.startswith(f"{(frames_folder / 'a').as_posix()}: ") and "Permission denied" in folder
    assert file.startswith("b/5.png: ") and "Permission denied" in file
    assert len((tmp_path / "out.csv").read_bytes().splitlines()) == 3


@posix_only
@pytest.mark.parametrize("extension", ["csv", "jsonl"])
def test_full_disk_keeps_the_rows_written_before(
    extension: str, tiny_bundle: Path, many_frames: Path, echoquad: Callable[..., Any], left_in: Any, tmp_path: Path
) -> None:
    import resource

    whole, out = tmp_path / f"whole.{extension}", tmp_path / f"out.{extension}"
    echoquad("predict", tiny_bundle, many_frames, "--out", whole)
    out.write_text("rows of an older run\n")
    # A file size limit of 4 kB looks like a full disk to the writer.
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))}
    ran = echoquad("predict", tiny_bundle, many_frames, "--out", out, code=1, **limit)
    code, message = ran.error
    assert code == "E_OUTPUT" and message.startswith(f"{out.as_posix()}: ") and os.strerror(errno.EFBIG) in message
    assert out.read_text() == "rows of an older run\n"
    kept = out.with_name(f"{out.name}.partial").read_bytes()
    rows = kept.count(b"cpu")
    assert rows > 5
    assert kept == whole.read_bytes()[: len(kept)]
    assert kept.endswith(b"\n")
    (line,) = [line for line in ran.err.splitlines() if line.startswith(f"{rows} rows ")]
    assert f"{out.as_posix()}.partial" in line and "--resume" in line
    ran = echoquad("predict", tiny_bundle, many_frames, "--out", out, "--resume")
    assert f"{60 - rows} frames: " in ran.err
    assert out.read_bytes() == whole.read_bytes()
    assert left_in(tmp_path) == []


@linux_only
def test_dev_full_exits_1(tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path) -> None:
    full = tmp_path / "full.csv"
    full.symlink_to("/dev/full")
    ran = echoquad("predict", tiny_bundle, frames_folder, "--out", full, code=1)
    assert ran.error[0] == "E_OUTPUT" and "full.csv: " in ran.errors[0] and "No space left" in ran.errors[0]
    assert full.is_symlink()
    with Path("/dev/full").open("wb") as stream:
        for command in (["predict", tiny_bundle, frames_folder], ["verify", tiny_bundle]):
            ran = echoquad(*command, stdout=stream, code=1)
            assert ran.error[0] == "E_OUTPUT"
            assert ran.errors[0].startswith("stdout: ") and "No space left" in ran.errors[0]


def test_pipe_receives_each_row_at_once(tiny_bundle: Path, many_frames: Path, started: Any, tmp_path: Path) -> None:
    process = started("predict", tiny_bundle, many_frames, "--overlay", tmp_path / "pictures")
    for _ in range(4):
        process.stdout.readline()
    assert process.poll() is None
    assert len(list((tmp_path / "pictures").iterdir())) < 50, "the first rows waited for the last"
    assert len(process.stdout.read().splitlines()) == 57


@posix_only
def test_named_pipe_receives_each_row_at_once(
    tiny_bundle: Path, many_frames: Path, started: Any, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    process = started("predict", tiny_bundle, many_frames, "--out", pipe, "--overlay", tmp_path / "pictures")
    with pipe.open("rb") as stream:
        assert stream.readline().startswith(b'{"file": "00.png"')
        assert process.poll() is None
        assert len(stream.readlines()) == 59
    assert process.wait(timeout=60) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "pictures", "pipe.jsonl"]


def test_head_receives_the_header(tiny_bundle: Path, many_frames: Path, started: Any) -> None:
    process = started("predict", tiny_bundle, many_frames)
    assert process.stdout.readline().startswith(b"file,method,pred_image,")
    process.stdout.close()
    stderr = process.stderr.read()
    process.wait(timeout=60)
    assert process.returncode in (0, 1)  # 0 if the pipe held all rows before it was closed
    assert b"Traceback" not in stderr
    assert b"Exception ignored" not in stderr
