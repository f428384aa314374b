"""Usage errors, exit codes and unexpected faults."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad.cli.framework.main import COMMANDS, load_command

WRONG = {
    ("nothing",): "No such command 'nothing'; see: echoquad --help",
    ("data", "nothing"): "No such command 'nothing'; see: echoquad data --help",
    ("predict",): "Missing argument 'BUNDLE'; see: echoquad predict --help",
    ("predict", "bundle"): "Missing argument 'INPUT'; see: echoquad predict --help",
    ("predict", "bundle", "x.png", "--nothing"): "No such option: --nothing; see: echoquad predict --help",
    ("predict", "bundle", "x.png", "--device", "tpu"): "'--device': 'tpu' is not one of 'auto', 'cpu', 'cuda'",
    ("predict", "bundle", "x.png", "--method", "oracle"): "'majority', 'average', 'weighted'",
    ("predict", "bundle", "x.png", "--batch-size", "0"): "'--batch-size'",
    ("predict", "bundle", "x.png", "--batch-size", "many"): "'--batch-size'",
    ("predict", "bundle", "x.png", "--threads", "0"): "'--threads'",
    ("predict", "bundle", "x.png", "--threads", "--untuned"): "'--threads'",
    ("predict", "bundle", "x.png", "--untuned=yes"): "--untuned",
    ("predict", "bundle", "x.png", "--abstain-below", "2"): "'--abstain-below'",
    ("predict", "bundle", "x.png", "--out", "result.xlsx"): ".xlsx",
    ("predict", "bundle", "x.png", "--out", "result"): ".csv or .jsonl",
    ("predict", "bundle", "x.png", "--cam"): "--overlay",
    ("predict", "bundle", "x.png", "--ray-address", "auto"): "--engine ray",
    ("predict", "bundle", "x.png", "--engine", "ray", "--workers", "2"): "--workers",
    ("predict", "bundle", "x.png", "--engine", "ray", "--overlay", "o", "--cam"): "--cam",
    ("train", "data"): "Missing option '--out'",
    ("train", "data", "--out", "run", "--epochs", "few"): "'--epochs'",
    ("evaluate", "run", "data"): "Missing option '--out'",
    ("export", "run"): "Missing option '--out'",
    ("export", "run", "--out", "bundle", "--calibrate", "data"): "--calibrate: only int8 is calibrated",
    ("bench", "bundle", "--frames", "0"): "'--frames'",
    ("doctor", "more"): "unexpected extra argument",
    ("demo", "--patients", "5"): "'--patients'",
}


def test_usage_errors_are_one_line_and_exit_2(many: Callable[..., Any], tmp_path: Path) -> None:
    found, modules = many(list(WRONG), cwd=tmp_path)
    assert "torch" not in modules
    for line, ran in zip(WRONG, found, strict=True):
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1), (line, ran)
        code, message = ran.error
        assert code == "E_USAGE", line
        assert WRONG[line] in message, line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_a_function_in_a_module_of_its_name(name: str) -> None:
    command = load_command(name)
    assert command.__name__ == name.rpartition(" ")[2]
    assert getattr(importlib.import_module(command.__module__), "__all__", []) == [command.__name__]
    assert command.__doc__ and COMMANDS[name].startswith(f"{name} ")


@pytest.mark.parametrize("wanted", [False, True])
def test_unexpected_exception_is_one_line_unless_the_traceback_is_requested(wanted: bool) -> None:
    code = """
import sys
from echoquad.cli.framework.main import main
from echoquad_runtime.engine import diagnostics
def run_diagnostics(*_, **__): raise ZeroDivisionError("two\\nlines")
diagnostics.run_diagnostics = run_diagnostics
sys.argv[1:] = ["doctor"]
main()
"""
    env = {**os.environ, "ECHOQUAD_TRACEBACK": "1" if wanted else ""}
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, env=env, encoding="utf-8")
    assert (ended.returncode, ended.stdout) == (1, "")
    if wanted:
        assert "Traceback" in ended.stderr
    else:
        assert ended.stderr.startswith("error[E_UNEXPECTED]: ")
        assert "ZeroDivisionError: two lines" in ended.stderr and "ECHOQUAD_TRACEBACK=1" in ended.stderr
        assert len(ended.stderr.splitlines()) == 1


def test_path_that_the_system_refuses_is_one_line_with_a_shortened_name() -> None:
    for line in (["data", "audit", "x" * 300], ["ensemble", "x" * 5000, "y" * 300, "--out", "z"]):
        command = [sys.executable, "-m", "echoquad", *line]
        env = {**os.environ, "ECHOQUAD_TRACEBACK": ""}
        ended = subprocess.run(command, check=False, capture_output=True, env=env, encoding="utf-8")
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith("error[E_INPUT_NOT_FOUND]: xxx") and len(ended.stderr) < 300


@pytest.mark.parametrize("option", ["--threads", "--batch-size"])
def test_absurd_counts_are_usage_errors(option: str) -> None:
    command = [sys.executable, "-m", "echoquad", "predict", "bundle", "data", option, "9" * 30]
    ended = subprocess.run(command, check=False, capture_output=True, encoding="utf-8")
    assert ended.returncode == 2 and ended.stderr.startswith("error[E_USAGE]: ") and option in ended.stderr
