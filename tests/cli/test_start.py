"""What the first decision waits for: the modules that are imported until then, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad.cli.app import COMMANDS

# Ends with a line on stderr: what was imported, and which of it lies where pip installs.
DRIVER = """
import atexit, json
before = set(sys.modules)
def tell():
    names = sorted(set(sys.modules) - before)
    places = {name: getattr(sys.modules[name], "__file__", None) or "" for name in names}
    foreign = {name.partition(".")[0] for name, place in places.items() if "site-packages" in place}
    print("MODULES", json.dumps([names, sorted(foreign)]), file=sys.stderr)
atexit.register(tell)
"""

SPARED = {
    # They take longer than the decision itself.
    *("typer", "rich", "pydantic", "torch", "onnx", "matplotlib", "cryptography", "model_signing", "ray", "pyarrow"),
    *("importlib.metadata", "email", "asyncio", "concurrent.futures", "multiprocessing", "argparse", "http", "ssl"),
    *("PIL.ImageDraw", "PIL.ImageFont", "numpy.testing", "numpy.f2py"),
    # Other commands, and what they alone need.
    *(f"echoquad.cli.{name}" for name in ("full", "extras", "bench", "data", "doctor", "train", "tune", "verify")),
    *(f"echoquad_runtime.{name}" for name in ("bench", "cluster", "overlay", "tuning.tune", "tuning.racing", "verify")),
    *(f"echoquad_runtime.{name}" for name in ("bundle.model_card", "bundle.signature", "engine.diagnostics")),
    *("echoquad_runtime.results.shards", "echoquad_runtime.tuning.measurement"),
    *("echoquad_train", "echoquad_export"),
}


@pytest.mark.parametrize("out", [False, True])
def test_one_frame_imports_what_it_needs(
    out: bool, echoquad: Callable[..., Any], tiny_bundle: Path, frames_folder: Path, tmp_path: Path
) -> None:
    wanted = ["--out", tmp_path / "decision.csv"] if out else []
    ran = echoquad("predict", tiny_bundle, frames_folder / "a/0.png", "--device", "cpu", *wanted, driver=DRIVER)
    line = ran.err.splitlines()[-1]
    names, foreign = json.loads(line.removeprefix("MODULES "))
    assert set(foreign) == {"numpy", "PIL", "onnxruntime"}
    assert SPARED.isdisjoint(names)
    assert "echoquad_runtime.predict.predictor" in names, "it has not judged at all"


@pytest.mark.parametrize("line", [["doctor", "more"], ["sign", "--help"], ["sign"]], ids=" ".join)
def test_a_line_imports_the_command_that_it_names(line: list[str], echoquad: Callable[..., Any]) -> None:
    ran = echoquad(*line, driver=DRIVER, code=0 if "--help" in line else 2)
    names, _ = json.loads(ran.err.splitlines()[-1].removeprefix("MODULES "))
    assert set(names) & {f"echoquad.cli.{name}" for name in (*COMMANDS, "data")} == {f"echoquad.cli.{line[0]}"}
    assert {"numpy", "PIL", "onnxruntime", "torch"}.isdisjoint(names)
