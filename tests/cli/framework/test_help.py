"""Help pages, their examples, and the commands that the documentation shows."""

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
        *["DATA", "--out", "--recipe", "--set", "--weights", "--input-size", "--epochs", "--batch-size", "--teacher"],
        *["--quadrant-layout"],
        *["--folds", "--fit", "--matrices", "--flip", "--every", "--patient-regex", "--device", "--seed", "--stream"],
        *["--workers", "--tensorboard", "--resume"],
    ],
    ("ensemble",): ["RUN", "--out", "--vote", "--flip", "--calibrate"],
    ("evaluate",): [
        *["RUN_OR_BUNDLE", "DATA", "--split", "--out", "--method", "--device", "--precision", "--threshold-from"],
        *["--at-specificity", "--at-sensitivity", "--abstain-below", "--patient-regex", "--bootstrap", "--gallery"],
        *["--matrices", "--flip", "--every", "--batch-size", "--threads", "--seed"],
    ],
    ("export",): [
        *["RUN", "--out", "--precision", "--calibrate", "--calibration-frames", "--parity", "--golden"],
        *["--frame-graph", "--triton", "--sign-key", "--codes"],
    ],
    ("sign",): ["BUNDLE", "--key"],
    ("verify",): ["BUNDLE", "--device", "--precision", "--all-devices", "--threads", "--json", "--public-key"],
    ("inspect",): ["BUNDLE", "--json", "--markdown"],
    ("predict",): [
        *["BUNDLE", "INPUT", "--out", "--resume", "--shard", "--method", "--overlay", "--cam", "--abstain-below"],
        *["--device", "--precision", "--batch-size", "--threads", "--workers", "--untuned", "--public-key"],
        *["--cuda-graphs", "--nhwc", "--engine", "--ray-address", "--matrices", "--flip", "--every"],
    ],
    ("merge",): ["FILE", "--out"],
    ("bench",): [
        *["BUNDLE", "INPUT", "--json", "--frames", "--batch-size", "--precision", "--device", "--threads"],
        *["--fps", "--histogram", "--max-p99-ms", "--untuned", "--public-key", "--cuda-graphs", "--nhwc"],
    ],
    ("tune",): [
        *["BUNDLE", "INPUT", "--goal", "--max-p99-ms", "--device", "--precision", "--threads", "--batch-size"],
        *["--seconds", "--exhaustive", "--seed", "--public-key", "--json", "--forget"],
    ],
    ("serve",): ["BUNDLE", "--config", "--port", "--store", "--source", "--shadow"],
    ("doctor",): ["--device", "--json", "--report", "--bundle", "--config", "--log"],
    ("pack",): [
        *["BUNDLE", "--out", "--target", "--python", "--extras", "--key", "--config", "--wheel", "--glibc", "--check"],
        *["--public-key"],
    ],
    ("audit",): ["verify"],
    ("audit", "verify"): ["PATH", "--site-key"],
    ("fleet",): ["check"],
    ("fleet", "check"): [
        *["URL", "--file", "--expect", "--late", "--timeout", "--token-file", "--ca", "--certificate", "--key"],
        *["--json"],
    ],
    ("data",): ["audit", "split", "patches", "phantom"],
    ("data", "audit"): ["DATA", "--out", "--patient-regex", "--strict", "--seed", "--matrices", "--flip", "--every"],
    ("data", "split"): [
        *["SOURCE", "--out", "--fractions", "--mode", "--patient-regex", "--seed", "--matrices", "--every"]
    ],
    ("data", "patches"): ["DATA", "--out", "--keep", "--quadrant-layout", "--matrices", "--flip", "--every"],
    ("data", "phantom"): ["DIR", "--patients", "--frames", "--seed"],
    ("demo",): ["--out", "--patients", "--epochs", "--serve", "--port", "--no-open"],
}

GROUPS = (("audit",), ("data",), ("fleet",))

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def pages(many: Callable[..., Any]) -> dict[tuple[str, ...], str]:
    """Return the help page of each command."""
    found, modules = many([[*command, "--help"] for command in COMMANDS], env={"COLUMNS": "200"})
    assert [ran.code for ran in found] == [0] * len(COMMANDS)
    heavy = {"numpy", "PIL", "torch", "onnxruntime", "onnx", "sklearn", "scipy", "matplotlib", "safetensors"}
    assert heavy & modules == set(), "a help page imports a package that it does not need"
    return {command: ran.out for command, ran in zip(COMMANDS, found, strict=True)}


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "cp437"}, {"LC_ALL": "C"}],
    ids=str,
)
def test_help_prints_in_every_encoding(env: dict[str, str]) -> None:
    driver = "import sys\nfrom echoquad.cli.framework.main import main\n"
    driver += f"for line in {[[*command, '--help'] for command in COMMANDS]!r}:\n    sys.argv[1:] = line\n"
    driver += "    try:\n        main()\n    except SystemExit as error:\n        assert error.code == 0, line\n"
    kept = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **env}
    ended = subprocess.run([sys.executable, "-c", driver], check=False, capture_output=True, env=kept)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.count(b"Usage: echoquad") == len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_lists_every_argument_and_option(command: tuple[str, ...], pages: dict[tuple[str, ...], str]) -> None:
    page = pages[command]
    assert f"Usage: echoquad {' '.join(command)}".strip() in page
    missing = [word for word in [*COMMANDS[command], "--help"] if not re.search(rf"(?<![\w-]){word}(?![\w-])", page)]
    assert missing == []
    if command and command not in GROUPS:
        assert f"Example: echoquad {' '.join(command)}" in page


def test_help_examples_use_existing_commands_and_options(pages: dict[tuple[str, ...], str]) -> None:
    examples = [
        line for page in pages.values() for line in re.findall(r"Example: (echoquad .*?)\s*$", page, re.MULTILINE)
    ]
    assert len(examples) == len(COMMANDS) - 1 - len(GROUPS)
    for example in examples:
        assert unknown_words(example, pages) == []


def test_main_help_lists_commands_and_exit_codes(pages: dict[tuple[str, ...], str]) -> None:
    assert [name for (name, *_) in filter(None, COMMANDS) if f"│ {name} " not in pages[()]] == []
    page = " ".join(pages[()].split())
    assert "Exit codes: 0 done; 1 bad input, model or configuration; 2 usage; 3 parity or verification failed" in page
    assert re.search(r"4 the requested device [\w ]+; 5 done, but some inputs failed\.", page)


DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_show_existing_commands_and_options(document: str, pages: dict[tuple[str, ...], str]) -> None:
    wrong = {}
    for line in shell_lines((ROOT / document).read_text("utf-8")):
        if unknown := unknown_words(line, pages):
            wrong[line] = unknown
    assert wrong == {}


def shell_lines(text: str) -> list[str]:
    """Return the lines that run echoquad, from code blocks and inline code; a trailing backslash joins lines."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks += ["\n".join(re.findall(r"^(?: {4}|\t)(.*)$", text, re.MULTILINE))]
    lines = [line.strip() for block in blocks for line in re.sub(r"[\\`]\n\s*", " ", block).splitlines()]
    lines += re.findall(r"`(echoquad \w[^`]*)`", text)
    commands = (re.match(r"(?:[$>] )?(?:\S*python\S* -m )?(echoquad .*)", line) for line in lines)
    return [found[1] for found in commands if found]


def test_shell_lines_finds_blocks_continuations_and_inline_code() -> None:
    text = "Do `echoquad doctor`.\n\n    $ echoquad train data\\\n        --out run\n\n"
    text += "```sh\npython -m echoquad demo\n```\n"
    assert shell_lines(text) == ["echoquad demo", "echoquad train data --out run", "echoquad doctor"]


def unknown_words(line: str, pages: dict[tuple[str, ...], str]) -> list[str]:
    """Return the commands and options of a line that the help pages do not have."""
    words = [word for word in shlex.split(line, comments=True)[1:] if word not in ("|", "&&")]
    command = tuple(words[:2]) if tuple(words[:1]) in GROUPS else tuple(words[:1])
    if command and command[0].startswith("-"):
        command = ()
    if command not in pages:
        return [" ".join(command)]
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", pages[command])]


def test_version_is_printed_to_stdout(echoquad: Callable[..., Any]) -> None:
    from echoquad import __version__

    ran = echoquad("--version")
    assert (ran.out, ran.err) == (f"echoquad {__version__}\n", "")


@pytest.mark.parametrize("command", [(), *GROUPS], ids=" ".join)
def test_missing_command_shows_help_and_exits_2(command: tuple[str, ...], echoquad: Callable[..., Any]) -> None:
    ran = echoquad(*command, code=2, help_only=True)
    assert "Commands" in ran.out
    assert ran.err == ""
