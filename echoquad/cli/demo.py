"""``echoquad demo``."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

from echoquad.cli.console import note
from echoquad.cli.declare import Option
from echoquad.cli.extras import require_extra

__all__ = ["demo"]

MARK = ".echoquad-demo"  # only a folder with this file in it is ever replaced


def demo(
    out: Annotated[Path, Option("--out", metavar="DIR", help="Folder to write; an older demo is replaced.")] = Path(
        "demo"
    ),
    patients: Annotated[int, Option("--patients", metavar="N", min=6, help="Phantom patients, two frames each.")] = 220,
    epochs: Annotated[int, Option("--epochs", metavar="N", min=1, help="Epochs of training.")] = 12,
) -> None:
    """Run all of it on phantom frames: draw, train, export, verify, predict, bench. A few minutes on a CPU."""
    from echoquad_runtime.errors import OutputError
    from echoquad_runtime.storage.atomic import make_folder, write_bytes

    require_extra("export")
    if out.exists() and not (out / MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"{out.as_posix()}: is there and is no demo of before; it is left as it is; choose another --out"
        )
    shutil.rmtree(out, ignore_errors=True)
    make_folder(out)
    write_bytes(out / MARK, b"")
    root = out.as_posix()
    data, run, bundle = f"{root}/data", f"{root}/run", f"{root}/bundle"
    begin = time.perf_counter()
    recipe = ["--recipe", "scratch", "--input-size", "64", "--epochs", str(epochs)]
    for arguments in (
        ["data", "phantom", data, "--patients", str(patients), "--frames", "2"],
        ["train", data, "--out", run, *recipe],
        ["evaluate", run, data, "--split", "test", "--out", f"{root}/evaluation"],
        ["export", run, "--out", bundle],
        ["verify", bundle],
        ["predict", bundle, f"{data}/test", "--out", f"{root}/predictions.csv", "--overlay", f"{root}/overlays"],
        ["bench", bundle, f"{data}/test", "--json", f"{root}/bench.json"],
    ):
        _run(arguments)
    overlay = next(iter(sorted((out / "overlays").rglob("*.png"))), out / "overlays")
    note(f"\ndone in {time.perf_counter() - begin:.0f} s. What to look at:")
    for path, what in (
        (f"{root}/data/", "the phantoms: synthetic, ASD against NORM, patients apart between splits"),
        (f"{root}/run/curves.png", "how training went; run.json and metrics.csv beside it"),
        (f"{root}/evaluation/report.html", "every figure with its interval, in one page; metrics.json beside it"),
        (
            f"{root}/bundle/MODEL_CARD.md",
            "what a reader must know of the model; the folder is what a cart gets",
        ),
        (f"{root}/predictions.csv", "a row a frame: the decision, and what each quadrant said"),
        (overlay.as_posix(), "the same, drawn over the frame; one for each test frame"),
        (f"{root}/bench.json", "what it costs on this machine, by stage"),
    ):
        note(f"  {path}\n      {what}")
    note("The phantoms are easy to draw and prove nothing about patients. Research use only.")


def _run(arguments: list[str]) -> None:
    """Run a command as a user would, in a process of its own, after showing it."""
    note(f"\n$ echoquad {shlex.join(arguments)}")
    code = subprocess.run([sys.executable, "-m", "echoquad", *arguments], check=False).returncode
    if code:
        raise SystemExit(code)
