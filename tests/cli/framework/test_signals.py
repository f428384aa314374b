"""Ctrl-C and SIGTERM: the first signal ends a command in good order, the second at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has none of these signals")


def test_signal_that_surfaces_as_another_exception_is_an_interruption(tiny_bundle: Path, frames_folder: Path) -> None:
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
from echoquad.cli.framework.main import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ended.returncode == 143
    assert ended.stderr.decode().splitlines()[-1] == "interrupted"
    assert b"fault" not in ended.stderr


def test_second_signal_ends_the_process_at_once(tiny_bundle: Path, many_frames: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    code = f"""
import sys, time
from echoquad_runtime.results.result_file import ResultFile
ResultFile.close = lambda self: (print("closing", flush=True), time.sleep(60))
ResultFile.write = lambda self, row: (print("writing", flush=True), time.sleep(60))
sys.argv[1:] = ["predict", {str(tiny_bundle)!r}, {str(many_frames)!r}, "--out", {str(out)!r}]
from echoquad.cli.framework.main import main
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
        assert process.wait(timeout=60) == -signal.SIGTERM
