"""``echoquad demo``."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.framework.console import format_command, print_status
from echoquad.cli.framework.extras import require_extra

__all__ = ["demo"]

MARKER = ".echoquad-demo"  # only a folder that contains this file is ever replaced


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder to write; an older demo is replaced.")
    ] = Path("demo"),
    patients: Annotated[
        int, typer.Option("--patients", metavar="N", min=6, help="Phantom patients, two frames each.")
    ] = 220,
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", min=1, help="Training epochs.")] = 12,
) -> None:
    """Run every step on phantom frames: draw, train, export, verify, predict, bench. A few minutes on a CPU."""
    from echoquad_runtime.errors import OutputError
    from echoquad_runtime.storage.atomic import make_folder, write_bytes

    require_extra("export")
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out.as_posix()}: exists and is not an earlier demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    make_folder(out)
    write_bytes(out / MARKER, b"")
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
    overlay = min((out / "overlays").rglob("*.png"), default=out / "overlays")
    print_status("")
    print_status(f"done in {time.perf_counter() - begin:.0f} s. What to look at:")
    for path, description in (
        (f"{root}/data/", "the phantoms: synthetic frames of two classes, no patient in two splits"),
        (f"{root}/run/curves.png", "the training curves; run.json and metrics.csv are beside it"),
        (f"{root}/evaluation/report.html", "every figure with its interval on one page; metrics.json is beside it"),
        (f"{root}/bundle/MODEL_CARD.md", "the model card; the folder is what a cart receives"),
        (f"{root}/predictions.csv", "one row for each frame: its decision and those of its quadrants"),
        (overlay.as_posix(), "the decisions drawn over the frame, one picture for each test frame"),
        (f"{root}/bench.json", "latency on this machine, by stage"),
    ):
        print_status(f"  {path}")
        print_status(f"      {description}")
    print_status("Phantoms are easy to classify and prove nothing about patients. Research use only.")


def _run(arguments: list[str]) -> None:
    """Print a command and run it in a process of its own, as a user would."""
    print_status("")
    print_status(f"$ {format_command(*arguments)}")
    code = subprocess.run([sys.executable, "-m", "echoquad", *arguments], check=False).returncode
    if code:
        raise typer.Exit(code)
