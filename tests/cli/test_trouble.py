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
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="nothing is forbidden to root")
def test_folders_and_files_that_may_not_be_read(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    (frames_folder / "a").chmod(0)
    (frames_folder / "b" / "5.png").chmod(0)
    ran = echoquad("predict", tiny_bundle, frames_folder, "--out", tmp_path / "out.csv", code=5)
    (frames_folder / "a").chmod(0o700)
    folder, file = ran.errors
    assert folder == f"{(frames_folder / 'a').as_posix()}: the folder cannot be read (Permission denied); " + (
        "check its permissions"
    )
    assert file.startswith("b/5.png: it cannot be read (Permission denied)")
    assert len((tmp_path / "out.csv").read_bytes().splitlines()) == 3


@posix_only
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_disk_that_fills_keeps_the_rows_that_it_had_room_for(
    ending: str, tiny_bundle: Path, many_frames: Path, echoquad: Callable[..., Any], left_in: Any, tmp_path: Path
) -> None:
    import resource

    whole, out = tmp_path / f"whole.{ending}", tmp_path / f"out.{ending}"
    echoquad("predict", tiny_bundle, many_frames, "--out", whole)
    out.write_text("what an older run has found\n")
    # A file may not grow beyond 4 kB: to the one that writes, that is a full disk.
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))}
    ran = echoquad("predict", tiny_bundle, many_frames, "--out", out, code=1, **limit)
    assert ran.errors == [
        f"{out.as_posix()}: cannot be written ({os.strerror(errno.EFBIG)}); check space and permissions"
    ]
    assert out.read_text() == "what an older run has found\n"
    kept = out.with_name(f"{out.name}.partial").read_bytes()
    rows = kept.count(b"cpu")
    assert rows > 5
    assert kept == whole.read_bytes()[: len(kept)]
    assert kept.endswith(b"\n")
    line = f"{rows} rows are kept in {out.as_posix()}.partial; the same line with --resume goes on behind them"
    assert line in ran.err.splitlines()
    ran = echoquad("predict", tiny_bundle, many_frames, "--out", out, "--resume")
    assert f"{60 - rows} frames: " in ran.err
    assert out.read_bytes() == whole.read_bytes()
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


def wait_for_rows(process: Any, out: Path, count: int) -> None:
    """Wait until a run has written some rows."""
    partial, end = out.with_name(f"{out.name}.partial"), time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if partial.exists() and partial.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.005)
    pytest.fail("it was to be caught in the middle of its work")


@posix_only
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_keeps_whole_rows(
    number: int, code: int, tiny_bundle: Path, many_frames: Path, started: Any, echoquad: Any, tmp_path: Path
) -> None:
    out, pictures = tmp_path / "out.csv", tmp_path / "pictures"
    line = ["predict", tiny_bundle, many_frames, "--out", out, "--overlay", pictures]
    process = started(*line)
    wait_for_rows(process, out, 2)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stdout == b""
    *_, kept, last = stderr.decode().splitlines()
    assert last == "interrupted"
    partial = tmp_path / "out.csv.partial"
    rows = partial.read_bytes().count(b",cpu,fp32\n")
    assert kept == f"{rows} rows are kept in {partial.as_posix()}; the same line with --resume goes on behind them"
    assert b"Traceback" not in stderr
    assert not out.exists()
    assert partial.read_bytes().endswith(b"\n")
    assert [path.name for path in pictures.iterdir() if path.name.startswith(".")] == []
    echoquad(*line, "--resume")
    echoquad("predict", tiny_bundle, many_frames, "--out", tmp_path / "whole.csv")
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    # A row that is there has its picture.
    assert len(list(pictures.iterdir())) == 60


@posix_only
def test_an_interruption_that_comes_out_as_another_error_is_one(tiny_bundle: Path, frames_folder: Path) -> None:
    code = f"""
import os, signal, sys
from echoquad_runtime.predict.predictor import Predictor
def predict(*_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        raise RuntimeError("release unlocked lock")
Predictor.predict = predict
sys.argv[1:] = ["predict", {str(tiny_bundle)!r}, {str(frames_folder)!r}]
from echoquad.cli.app import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ended.returncode == 143
    assert ended.stderr.decode().splitlines()[-1] == "interrupted"
    assert b"fault" not in ended.stderr


@posix_only
def test_a_second_signal_ends_at_once(tiny_bundle: Path, many_frames: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    code = f"""
import sys, time
from echoquad_runtime.results.result_file import ResultFile
ResultFile.close = lambda self: (print("closing", flush=True), time.sleep(60))
ResultFile.write = lambda self, row: (print("writing", flush=True), time.sleep(60))
sys.argv[1:] = ["predict", {str(tiny_bundle)!r}, {str(many_frames)!r}, "--out", {str(out)!r}]
from echoquad.cli.app import main
main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"closing\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM


@posix_only
def test_a_second_run_on_the_same_file_is_refused(
    tiny_bundle: Path, many_frames: Path, started: Any, echoquad: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    line = ["predict", tiny_bundle, many_frames, "--out", out]
    process = started(*line, "--overlay", tmp_path / "pictures")
    wait_for_rows(process, out, 1)
    process.send_signal(signal.SIGSTOP)
    for options in ([], ["--resume"]):
        ran = echoquad(*line, *options, code=1)
        assert ran.errors == [
            f"{out.as_posix()}: another process is writing it; wait until it ends, or name another --out"
        ]
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(out.read_bytes().splitlines()) == 61


def test_rows_come_through_a_pipe_as_they_are_there(
    tiny_bundle: Path, many_frames: Path, started: Any, tmp_path: Path
) -> None:
    process = started("predict", tiny_bundle, many_frames, "--overlay", tmp_path / "pictures")
    for _ in range(4):
        process.stdout.readline()
    assert process.poll() is None
    assert len(list((tmp_path / "pictures").iterdir())) < 50, "the first rows waited for the last"
    assert len(process.stdout.read().splitlines()) == 57


@posix_only
def test_a_named_pipe_takes_rows_as_they_are_there(
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
