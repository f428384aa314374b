"""Console output: encodings, closed streams, terminals, pipes, log records."""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from echoquad.cli.framework import console
from echoquad_runtime.errors import FrameDamagedError, GateError
from echoquad_runtime.frames.frame_file import Failure

posix_only = pytest.mark.skipif(os.name != "posix", reason="Windows has none of it")


def test_errors_are_printed_with_their_code(capsys: pytest.CaptureFixture[str]) -> None:
    failure = Failure("exam/3.png", FrameDamagedError("the image is cut\nafter row 7"))
    assert console.print_error(GateError("p99 is 9 ms")) == 3
    assert console.print_failures([failure], done=1) == console.EXIT_PARTIAL == 5
    assert console.print_failures([failure], done=0) == 1
    assert console.print_failures([], done=0) == 0
    out, err = capsys.readouterr()
    line = "error[E_FRAME_DAMAGED]: exam/3.png: the image is cut after row 7"
    assert (out, err.splitlines()) == ("", ["error[E_GATE]: p99 is 9 ms", line, line])


@posix_only
def test_commands_to_paste_are_quoted() -> None:
    assert console.format_command("export", "run", "--out", "BUNDLE") == "echoquad export run --out BUNDLE"
    command = console.format_command("export", "my run/$(x)'1", "--out", "BUNDLE")
    assert shlex.split(command) == ["echoquad", "export", "my run/$(x)'1", "--out", "BUNDLE"]


def test_commands_to_paste_are_quoted_for_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.os, "name", "nt")
    assert console.format_command("export", "C:/my run") == 'echoquad export "C:/my run"'


def test_log_records_of_the_packages_are_status_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in console._LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    for _ in range(2):  # a second command in the same process must not print twice
        console.log_to_stderr()
    logging.getLogger("echoquad_runtime.tuning").info("measured %s of %s", 1, 2)
    logging.getLogger("echoquad_runtime.tuning").debug("not shown")
    assert capsys.readouterr().err == "measured 1 of 2\n"


def test_muted_console_prints_nothing_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_muted", False)
    console.mute()
    console.print_status("hidden")
    assert console.print_error(GateError("hidden")) == 3
    console.mute(False)
    console.print_status("shown")
    assert capsys.readouterr().err == "shown\n"


HOSTILE = "\x1b]0;title\x07\x9b2J\r\b\u202egpj.\u2066exe\u2028[red]:smile:\udcff"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_no_control_character_reaches_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = Failure(f"a\n{HOSTILE}.png", FrameDamagedError(f"{HOSTILE}\nerror[E_X]: forged"))
    console.print_result(f"two\nlines {HOSTILE}")
    console.print_result(console.format_table(["class"], [[f"A\nforged {HOSTILE}"]]))
    console.print_status(f"wrote a\nforged {HOSTILE}")
    console.print_error(GateError(HOSTILE))
    console.print_failure(failure)
    with console.Progress(f"decoding a\n{HOSTILE}", 2) as progress:
        monkeypatch.setattr(console, "_PLAIN_SECONDS", 0)
        progress.update(1)
    out, err = capsys.readouterr()
    assert CONTROL.findall(out + err) == []
    assert len(out.splitlines()) == 5 and len(err.splitlines()) == 4
    assert "\\x1b]0;title" in out and "[red]:smile:" in err and "\\u202e" in err


def test_progress_bar_interprets_no_markup_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with console.Progress("[red]:smile:", 2):
        console.print_status("wrote [bold]:smile:\x1b[2J/\x9b")
    shown = terminal.getvalue()
    assert "[red]:smile:" in shown and "wrote [bold]:smile:\\x1b[2J/\\x9b" in shown


@posix_only
def test_rows_on_a_terminal_are_escaped_and_rows_in_a_file_are_exact(tiny_bundle: Path, tmp_path: Path) -> None:
    import pty

    folder = tmp_path / "in"
    folder.mkdir()
    name = 'a\x1b[2J"b\n\u202ec;.png'
    Image.new("L", (40, 30), 99).save(folder / name)
    terminal, shell = pty.openpty()
    command = [sys.executable, "-m", "echoquad", "predict", tiny_bundle, folder]
    ended = subprocess.run(command, check=True, stdout=shell, stderr=subprocess.PIPE)
    os.close(shell)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert len(shown.splitlines()) == 2
    assert '"a\\x1b[2J""b\\n\\u202ec;.png"' in shown
    assert CONTROL.findall(shown.replace("\r\n", "\n") + ended.stderr.decode()) == []
    exact = subprocess.run(command, check=True, capture_output=True).stdout
    assert f'"{name}"'.replace('"b', '""b').encode() in exact


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_characters_that_the_console_lacks_are_escaped(
    encoding: str, echoquad: Callable[..., Any], bundle_copy: Path
) -> None:
    bundle = bundle_copy.rename(bundle_copy.with_name("Bündel-Ω"))
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    echoquad("predict", "--help", env=env)
    ran = echoquad("verify", bundle, env=env)
    assert "-\\u03a9: 3 files" in ran.out
    missing = echoquad("verify", bundle.with_name("Ω-nothing"), env=env, code=1)
    assert missing.error[0] == "E_BUNDLE_NOT_FOUND"


@posix_only
@pytest.mark.parametrize("closed", [[1], [2], [1, 2]], ids=str)
def test_streams_closed_by_the_shell_do_not_stop_predict(
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


def test_reader_that_closed_the_pipe_is_no_error(tiny_bundle: Path, frames_folder: Path, started: Any) -> None:
    for command in (["predict", tiny_bundle, frames_folder], ["verify", tiny_bundle], ["predict", "--help"]):
        reader, writer = os.pipe()
        process = started(*command, stdout=writer)
        os.close(writer)
        os.close(reader)  # as `| head -1` does when it has its line
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        assert b"Traceback" not in stderr
        assert b"Exception ignored" not in stderr
        if os.name == "posix":
            assert b"error" not in stderr


@posix_only
@pytest.mark.parametrize("rows_too", [False, True])
def test_terminal_shows_a_progress_bar_and_intact_rows(
    rows_too: bool, tiny_bundle: Path, frames_folder: Path, started: Any, tmp_path: Path
) -> None:
    import pty

    terminal, shell = pty.openpty()
    out = tmp_path / "out.csv"
    (frames_folder / "c.png").write_text("no image")
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
        except OSError:  # on Linux: the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    assert process.wait(timeout=60) == 5
    text = shown.decode()
    for part in ("predicting", "━", "7/7", "\x1b["):
        assert part in text
    assert "Traceback" not in text
    assert "error[E_FRAME_FORMAT]: c.png: " in text
    if rows_too:
        header = text.index("file,method,pred_image")  # rows on the same terminal follow the bar
        assert header > text.index("7/7")
        assert len(re.findall(r",cpu,fp32,\r?\n", text[header:])) == 6
    else:
        assert process.stdout.read() == b""
        assert len(out.read_text("utf-8").splitlines()) == 7
