"""Import budget: a command line imports what its command needs and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from echoquad.cli.framework.main import COMMANDS

# Prints a last line on stderr: the imported modules, and the packages among them that pip installs.
DRIVER = """
import atexit, json, sys
before = set(sys.modules)
def report():
    names = sorted(set(sys.modules) - before)
    places = {name: getattr(sys.modules[name], "__file__", None) or "" for name in names}
    foreign = {name.partition(".")[0] for name, place in places.items() if "site-packages" in place}
    print("MODULES", json.dumps([names, sorted(foreign)]), file=sys.stderr)
atexit.register(report)
"""

# A Typer command that does nothing: what it imports is the price of Typer and not of EchoQuad.
TYPER_ALONE = """
import typer
app = typer.Typer(add_completion=False)
@app.command()
def command(path: str, count: int = 1): ...
try: app(["x"], standalone_mode=False)
finally: report()
"""

FORBIDDEN = {
    # Each of them takes longer to import than a decision takes.
    *("rich", "pydantic", "torch", "onnx", "matplotlib", "cryptography", "model_signing", "ray", "pyarrow"),
    *("importlib.metadata", "email", "asyncio", "concurrent.futures", "multiprocessing", "argparse", "http", "ssl"),
    *("PIL.ImageDraw", "PIL.ImageFont", "numpy.testing", "numpy.f2py"),
    # Modules of other commands, and what only those need.
    "echoquad.cli.framework.extras",
    *(f"echoquad.cli.commands.{name.partition(' ')[0]}" for name in COMMANDS if name != "predict"),
    *(f"echoquad_runtime.{name}" for name in ("bench", "cluster", "overlay", "tuning.tune", "tuning.racing", "verify")),
    *(
        f"echoquad_runtime.{name}"
        for name in ("bundle.model_card", "bundle.signature", "bundle.signing", "engine.diagnostics")
    ),
    *("echoquad_runtime.results.shards", "echoquad_runtime.tuning.measurement"),
    *("echoquad_train", "echoquad_export"),
}


def test_forbidden_modules_exist() -> None:
    missing = [name for name in FORBIDDEN if name.startswith("echoquad") and util.find_spec(name) is None]
    assert missing == [], "a renamed module is no longer checked"


def imported(stderr: str) -> tuple[set[str], set[str]]:
    """Return the modules and the installed packages that `DRIVER` reports on the last line."""
    names, foreign = json.loads(stderr.splitlines()[-1].removeprefix("MODULES "))
    return set(names), set(foreign)


@pytest.mark.parametrize("out", [False, True])
def test_predict_of_one_frame_imports_only_what_it_needs(
    out: bool, echoquad: Callable[..., Any], tiny_bundle: Path, frames_folder: Path, tmp_path: Path
) -> None:
    options = ["--out", tmp_path / "decision.csv"] if out else []
    ran = echoquad("predict", tiny_bundle, frames_folder / "a/0.png", "--device", "cpu", *options, driver=DRIVER)
    names, foreign = imported(ran.err)
    alone = subprocess.run([sys.executable, "-c", DRIVER + TYPER_ALONE], check=True, capture_output=True, text=True)
    typer_names, typer_foreign = imported(alone.stderr)
    assert "typer" in typer_names and "rich" not in typer_names
    assert foreign - typer_foreign == {"numpy", "PIL", "onnxruntime"}
    assert (FORBIDDEN - typer_names).isdisjoint(names)
    assert "echoquad_runtime.predict.predictor" in names, "nothing was classified"


@pytest.mark.parametrize(
    "line", [["doctor", "more"], ["sign", "--help"], ["sign"], ["data", "phantom", "--help"]], ids=" ".join
)
def test_a_command_line_imports_no_other_command(line: list[str], echoquad: Callable[..., Any]) -> None:
    ran = echoquad(*line, driver=DRIVER, code=0 if "--help" in line else 2)
    names, _ = imported(ran.err)
    commands = {f"echoquad.cli.commands.{name.replace(' ', '.')}": name for name in COMMANDS}
    (found,) = [commands[name] for name in names if name in commands]
    assert line[: len(found.split())] == found.split()
    assert {"numpy", "PIL", "onnxruntime", "torch"}.isdisjoint(names)
    assert ("rich" in names) == ("--help" in line)
