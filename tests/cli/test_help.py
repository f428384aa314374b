"""Help, version, wrong use: what a user sees first."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMANDS = {
    (): ["--version"],
    ("train",): [
        "DATA",
        "--out",
        "--recipe",
        "--set",
        "--weights",
        "--input-size",
        "--epochs",
        "--batch-size",
        "--fit",
        "--device",
        "--seed",
        "--stream",
        "--workers",
        "--tensorboard",
        "--resume",
        "--matrices",
        "--flip",
        "--every",
        "--folds",
        "--patient-regex",
    ],
    ("ensemble",): ["RUN", "--out", "--vote", "--flip", "--calibrate"],
    ("evaluate",): [
        *["RUN_OR_BUNDLE", "DATA", "--split", "--out", "--method", "--device", "--precision", "--threshold-from"],
        *["--matrices", "--flip", "--every"],
        *["--at-specificity", "--at-sensitivity", "--abstain-below", "--patient-regex", "--bootstrap", "--gallery"],
    ],
    ("export",): ["RUN", "--out", "--precision", "--calibrate", "--parity", "--golden", "--frame-graph", "--sign-key"],
    ("sign",): ["BUNDLE", "--key"],
    ("verify",): ["BUNDLE", "--device", "--precision", "--all-devices", "--json", "--public-key"],
    ("inspect",): ["BUNDLE", "--json", "--markdown"],
    ("predict",): [
        "BUNDLE",
        "INPUT",
        "--out",
        "--resume",
        "--shard",
        "--method",
        "--overlay",
        "--abstain-below",
        "--device",
        "--precision",
        "--batch-size",
        "--threads",
        "--untuned",
        "--public-key",
        "--matrices",
        "--flip",
        "--every",
    ],
    ("merge",): ["FILE", "--out"],
    ("bench",): [
        *["BUNDLE", "INPUT", "--json", "--frames", "--batch-size", "--precision", "--device"],
        *["--fps", "--histogram", "--max-p99-ms", "--untuned", "--public-key"],
    ],
    ("tune",): [
        *["BUNDLE", "INPUT", "--goal", "--max-p99-ms", "--device", "--precision", "--threads", "--batch-size"],
        *["--seconds", "--exhaustive", "--seed", "--public-key", "--json", "--forget"],
    ],
    ("doctor",): ["--device", "--json"],
    ("data",): ["audit", "split", "patches", "phantom"],
    ("data", "audit"): ["DATA", "--out", "--patient-regex", "--strict", "--seed", "--matrices", "--flip", "--every"],
    ("data", "split"): [
        *["SOURCE", "--out", "--fractions", "--mode", "--patient-regex", "--seed", "--matrices", "--every"]
    ],
    ("data", "patches"): ["DATA", "--out", "--keep", "--matrices", "--flip", "--every"],
    ("data", "phantom"): ["DIR", "--patients", "--frames", "--seed"],
    ("demo",): ["--out", "--patients", "--epochs"],
}

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pages(many: Callable[..., Any]) -> dict[tuple[str, ...], str]:
    """Give each command's help."""
    found, modules = many([[*command, "--help"] for command in COMMANDS], env={"COLUMNS": "200"})
    assert [ran.code for ran in found] == [0] * len(COMMANDS)
    heavy = {"torch", "onnxruntime", "onnx", "sklearn", "scipy", "matplotlib", "safetensors"}
    assert heavy & modules == set(), "a help page waits for what it has no need of"
    return {command: ran.out for command, ran in zip(COMMANDS, found, strict=True)}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_help_names_every_argument_and_option(command: tuple[str, ...], pages: dict[tuple[str, ...], str]) -> None:
    page = pages[command]
    assert f"Usage: echoquad {' '.join(command)}".strip() in page
    missing = [word for word in [*COMMANDS[command], "--help"] if not re.search(rf"(?<![\w-]){word}(?![\w-])", page)]
    assert missing == []
    if command and command != ("data",):
        assert f"Example: echoquad {' '.join(command)}" in page


def test_the_examples_of_the_help_are_right(pages: dict[tuple[str, ...], str]) -> None:
    examples = [
        line for page in pages.values() for line in re.findall(r"Example: (echoquad .*?)\s*$", page, re.MULTILINE)
    ]
    assert len(examples) == len(COMMANDS) - 2
    for example in examples:
        assert unknown_in(example, pages) == []


def test_the_whole_help_lists_commands_and_exit_codes(pages: dict[tuple[str, ...], str]) -> None:
    assert [name for (name, *_) in filter(None, COMMANDS) if f"│ {name} " not in pages[()]] == []
    page = " ".join(pages[()].split())
    assert "Exit codes: 0 done; 1 bad input, model or configuration; 2 usage; 3 parity or verification failed" in page
    assert "4 the device asked for is not there; 5 done, but some inputs failed." in page


@pytest.mark.parametrize("document", ["README.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))])
def test_the_commands_in_the_documents_exist(document: str, pages: dict[tuple[str, ...], str]) -> None:
    path = ROOT / document if document == "README.md" else ROOT / "docs" / document
    wrong = {}
    for line in shell_lines(path.read_text("utf-8")):
        if unknown := unknown_in(line, pages):
            wrong[line] = unknown
    assert wrong == {}


def shell_lines(text: str) -> list[str]:
    """Find what runs echoquad in blocks and in inline code; a line that ends in a backslash goes on."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks += ["\n".join(re.findall(r"^(?: {4}|\t)(.*)$", text, re.MULTILINE))]
    lines = [line.strip() for block in blocks for line in re.sub(r"[\\`]\n\s*", " ", block).splitlines()]
    lines += re.findall(r"`(echoquad \w[^`]*)`", text)
    commands = (re.match(r"(?:[$>] )?(?:\S*python\S* -m )?(echoquad .*)", line) for line in lines)
    return [found[1] for found in commands if found]


def test_the_lines_of_a_document_are_found() -> None:
    text = "Do `echoquad doctor`.\n\n    $ echoquad train data\\\n        --out run\n\n"
    text += "```sh\npython -m echoquad demo\n```\n"
    assert shell_lines(text) == ["echoquad demo", "echoquad train data --out run", "echoquad doctor"]


def unknown_in(line: str, pages: dict[tuple[str, ...], str]) -> list[str]:
    """Name the commands and options of a line that the help does not know."""
    words = [word for word in shlex.split(line, comments=True)[1:] if word not in ("|", "&&")]
    command = tuple(words[:2]) if words[:1] == ["data"] else tuple(words[:1])
    if command and command[0].startswith("-"):
        command = ()
    if command not in pages:
        return [" ".join(command)]
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", pages[command])]


def test_version(echoquad: Callable[..., Any]) -> None:
    from echoquad import __version__

    ran = echoquad("--version")
    assert (ran.out, ran.err) == (f"echoquad {__version__}\n", "")


@pytest.mark.parametrize("command", [(), ("data",)], ids=["echoquad", "data"])
def test_no_command_shows_the_help(command: tuple[str, ...], echoquad: Callable[..., Any]) -> None:
    ran = echoquad(*command, code=2, help_only=True)
    assert "Commands" in ran.out
    assert ran.err == ""


WRONG = {
    ("nothing",): "No such command 'nothing'; see: echoquad --help",
    ("data", "nothing"): "No such command 'nothing'; see: echoquad data --help",
    ("predict",): "Missing argument 'BUNDLE'; see: echoquad predict --help",
    ("predict", "bundle"): "Missing argument 'INPUT'; see: echoquad predict --help",
    ("predict", "bundle", "x.png", "--nothing"): "No such option: --nothing",
    ("predict", "bundle", "x.png", "--device", "tpu"): "'auto', 'cpu', 'cuda'",
    ("predict", "bundle", "x.png", "--method", "oracle"): "'majority', 'average', 'weighted'",
    ("predict", "bundle", "x.png", "--batch-size", "0"): "'--batch-size'",
    ("predict", "bundle", "x.png", "--batch-size", "many"): "'--batch-size'",
    ("predict", "bundle", "x.png", "--threads", "0"): "'--threads'",
    ("predict", "bundle", "x.png", "--out", "result.xlsx"): "the extension is '.xlsx'; expected .csv or .jsonl",
    ("predict", "bundle", "x.png", "--out", "result"): "the extension is ''; expected .csv or .jsonl",
    ("train", "data"): "Missing option '--out'",
    ("train", "data", "--out", "run", "--epochs", "few"): "'--epochs'",
    ("evaluate", "run", "data"): "Missing option '--out'",
    ("export", "run"): "Missing option '--out'",
    ("export", "run", "--out", "bundle", "--calibrate", "data"): "--calibrate: only int8 is calibrated",
    ("bench", "bundle", "--frames", "0"): "'--frames'",
    ("doctor", "more"): "unexpected extra argument",
    ("demo", "--patients", "5"): "'--patients'",
}


def test_wrong_use_is_one_line_and_exit_code_2(many: Callable[..., Any], tmp_path: Path) -> None:
    found, modules = many(list(WRONG), cwd=tmp_path)
    assert "torch" not in modules
    for line, ran in zip(WRONG, found, strict=True):
        assert ran.code == 2, line
        assert len(ran.err.splitlines()) == 1, line
        assert WRONG[line] in ran.err, line
        assert ran.out == "", line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_of_another_encoding(encoding: str, echoquad: Callable[..., Any], bundle_copy: Path) -> None:
    bundle = bundle_copy.rename(bundle_copy.with_name("Bündel-Ω"))
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    echoquad("predict", "--help", env=env)
    ran = echoquad("verify", bundle, env=env)
    assert "-\\u03a9: 3 files whole" in ran.out
    wrong = echoquad("verify", bundle.with_name("Ω-nothing"), env=env, code=1)
    assert "no bundle here" in wrong.err


@pytest.mark.parametrize("wanted", [False, True])
def test_a_fault_of_our_own_is_a_line_too_unless_the_traceback_is_asked_for(wanted: bool, tmp_path: Path) -> None:
    code = """
import sys
from echoquad.cli import app
from echoquad_runtime.engine import diagnostics as doctor
def examine(*_, **__): raise ZeroDivisionError("two\\nlines")
doctor.examine = examine
sys.argv[1:] = ["doctor"]
app.main()
"""
    env = {**os.environ, "ECHOQUAD_TRACEBACK": "1" if wanted else ""}
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, env=env, encoding="utf-8")
    assert (ended.returncode, ended.stdout) == (1, "")
    if wanted:
        assert "Traceback" in ended.stderr
    else:
        assert ended.stderr.startswith("error: unexpected ZeroDivisionError: two lines; this is a fault in EchoQuad: ")
        assert len(ended.stderr.splitlines()) == 1
