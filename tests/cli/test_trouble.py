"""A full disk, a closed pipe, Ctrl-C, a terminal: ``echoquad predict`` where the world does not play along."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

posix_only = pytest.mark.skipif(os.name != "posix", reason="Windows has none of it")
linux_only = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@pytest.fixture
def many_frames(make_frame: Any, tmp_path: Path) -> Path:
    """Give a folder of 60 frames: their rows are more than a stream's buffer holds, their overlays take seconds."""
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(60):
        Image.fromarray(make_frame(index)).save(folder / f"{index:02d}.png")
    return folder


def test_an_output_that_cannot_be_written(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder.csv").mkdir()
    places = [
        (["--out", tmp_path / "missing" / "out.csv"], "cannot be written (No such file or directory)"),
        (["--out", tmp_path / "file" / "out.csv"], "cannot be written (Not a directory)"),
        (["--out", tmp_path / "folder.csv"], "folder.csv: is a folder; expected a file name"),
        (["--out", tmp_path / "out.csv", "--overlay", tmp_path / "file"], "file"),
        (["--out", tmp_path / "out.csv", "--overlay", tmp_path / "file" / "below"], "file/below"),
    ]
    found, _ = many([["predict", tiny_bundle, frames_folder, *options] for options, _ in places])
    for (options, words), ran in zip(places, found, strict=True):
        assert (ran.code, ran.out, len(ran.errors)) == (1, "", 1), options
        assert "cannot be written" in ran.errors[0] or "is a folder" in ran.errors[0], options
        if os.name == "posix":  # where the system words it otherwise
            assert words in ran.errors[0], options
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.csv", "frames"]


@posix_only
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    ran = echoquad("predict", tiny_bundle, frames_folder, "--out", tmp_path / "locked" / "out.csv", code=1)
    assert "cannot be written (Permission denied); check space and permissions" in ran.errors[0]


@posix_only
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_disk_that_fills_leaves_nothing_half_written(
    ending: str, tiny_bundle: Path, many_frames: Path, echoquad: Callable[..., Any], left_in: Any, tmp_path: Path
) -> None:
    import resource

    out = tmp_path / f"out.{ending}"
    out.write_text("what an older run has found\n")
    # A file may not grow beyond 4 kB: to the one that writes, that is a full disk.
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))}
    ran = echoquad("predict", tiny_bundle, many_frames, "--out", out, code=1, **limit)
    assert ran.errors == [
        f"{out.as_posix()}: cannot be written ({os.strerror(errno.EFBIG)}); check space and permissions"
    ]
    assert out.read_text() == "what an older run has found\n"
    assert left_in(tmp_path) == []


@linux_only
def test_dev_full(tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path) -> None:
    full = tmp_path / "full.csv"
    full.symlink_to("/dev/full")
    ran = echoquad("predict", tiny_bundle, frames_folder, "--out", full, code=1)
    assert "full.csv: cannot be written (No space left on device)" in ran.errors[0]
    assert full.is_symlink()
    with Path("/dev/full").open("wb") as stream:
        for command in (["predict", tiny_bundle, frames_folder], ["verify", tiny_bundle]):
            ran = echoquad(*command, stdout=stream, code=1)
            assert ran.errors == ["stdout: cannot be written (No space left on device); check space and permissions"]


@posix_only
def test_ctrl_c_leaves_nothing_half_written(
    tiny_bundle: Path, many_frames: Path, started: Any, left_in: Any, tmp_path: Path
) -> None:
    out, pictures = tmp_path / "out.csv", tmp_path / "pictures"
    process = started("predict", tiny_bundle, many_frames, "--out", out, "--overlay", pictures)
    end = time.monotonic() + 60
    while not list(pictures.glob("*.png")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert left_in(tmp_path), "it was to be caught in the middle of its work"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == b""
    assert stderr.decode().splitlines()[-1] == "interrupted"
    assert b"Traceback" not in stderr
    assert not out.exists()
    assert left_in(tmp_path) == []


def test_a_reader_that_has_gone_away(tiny_bundle: Path, frames_folder: Path, started: Any) -> None:
    for command in (["predict", tiny_bundle, frames_folder], ["verify", tiny_bundle], ["predict", "--help"]):
        reader, writer = os.pipe()
        process = started(*command, stdout=writer)
        os.close(writer)
        os.close(reader)  # as `| head -1` does, once it has its line
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        assert b"Traceback" not in stderr
        assert b"Exception ignored" not in stderr
        if os.name == "posix":
            assert b"error" not in stderr


def test_head_gets_its_line(tiny_bundle: Path, many_frames: Path, started: Any) -> None:
    process = started("predict", tiny_bundle, many_frames)
    assert process.stdout.readline().startswith(b"file,method,pred_image,")
    process.stdout.close()
    stderr = process.stderr.read()
    process.wait(timeout=60)
    assert process.returncode in (0, 1)  # 0 where all of it was in the pipe before it was closed
    assert b"Traceback" not in stderr
    assert b"Exception ignored" not in stderr


@posix_only
@pytest.mark.parametrize("closed", [[1], [2], [1, 2]], ids=str)
def test_a_stream_that_the_shell_has_closed(
    closed: list[int], tiny_bundle: Path, frames_folder: Path, tmp_path: Path
) -> None:
    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    out = tmp_path / "out.csv"
    command = [sys.executable, "-m", "echoquad", "predict", tiny_bundle, frames_folder, "--out", out]
    ended = subprocess.run(command, check=False, capture_output=True, preexec_fn=close)
    assert (ended.returncode, ended.stdout) == (0, b"")
    assert b"Traceback" not in ended.stderr
    assert len(out.read_text("utf-8").splitlines()) == 7
    ended = subprocess.run([*command[:-2]], check=False, capture_output=True, preexec_fn=close)
    assert ended.returncode == 0
    assert b"Traceback" not in ended.stderr


@posix_only
@pytest.mark.parametrize("rows_too", [False, True])
def test_a_terminal_shows_a_bar(
    rows_too: bool, tiny_bundle: Path, frames_folder: Path, started: Any, tmp_path: Path
) -> None:
    import pty

    terminal, shell = pty.openpty()
    out = tmp_path / "out.csv"
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONUTF8": "1"}
    for name in ("NO_COLOR", "CI", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        env.pop(name, None)
    target = {"stdout": shell} if rows_too else {}
    options = () if rows_too else ("--out", out)
    process = started("predict", tiny_bundle, frames_folder, *options, stderr=shell, env=env, **target)
    os.close(shell)
    shown = b""
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # Linux' way to say that the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    for part in ("predicting", "━", "6/6", "\x1b["):
        assert part in text
    assert "Traceback" not in text
    if rows_too:
        header = text.index("file,method,pred_image")  # on the same terminal the rows follow the bar, untorn
        assert header > text.index("6/6")
        assert len(re.findall(r",cpu,fp32\r?\n", text[header:])) == 6
    else:
        assert process.stdout.read() == b""
        assert len(out.read_text("utf-8").splitlines()) == 7


def test_an_output_in_place_of_an_input_folder_is_left_alone(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    before = shutil.copytree(frames_folder, tmp_path / "before")
    names = sorted(path.relative_to(before) for path in Path(before).rglob("*"))
    many([["predict", tiny_bundle, frames_folder], ["bench", tiny_bundle, frames_folder, "--frames", "2"]])
    assert sorted(path.relative_to(frames_folder) for path in frames_folder.rglob("*")) == names
    assert all(
        (frames_folder / name).read_bytes() == (Path(before) / name).read_bytes()
        for name in names
        if (Path(before) / name).is_file()
    )
