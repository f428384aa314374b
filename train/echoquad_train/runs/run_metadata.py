"""Run metadata: ``run.json``, ``metrics.csv`` and ``curves.png``, rewritten after each epoch."""

from __future__ import annotations

import csv
import io
import math
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from echoquad_runtime._version import __version__
from echoquad_runtime.contract import Contract
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.storage.atomic import write_bytes, write_json
from echoquad_train.data.dataset import Split
from echoquad_train.plot_style import save
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint
from echoquad_train.runs.history import Epoch, model_epoch
from echoquad_train.runs.training_curves import training_curves

__all__ = ["collect_metadata", "git_commit", "versions", "write_run"]

SCHEMA: Final = 1

REDRAW_SECONDS: Final = 20.0
"""Age of ``curves.png`` from which it is drawn again: drawing takes a fifth of a second."""

_PACKAGES: Final = (
    "numpy",
    "pillow",
    "torch",
    "torchvision",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "onnxscript",
)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version(), "echoquad": __version__, "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def collect_metadata(
    data: Path,
    recipe: Recipe,
    contract: Contract,
    splits: Iterable[Split],
    failures: Sequence[Failure],
    device: str,
    precision: str,
    teacher: Mapping[str, Any] | None = None,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
) -> dict[str, Any]:
    """Return what is known of a run before its first epoch. Unreadable frames are not counted."""
    unreadable = {failure.file for failure in failures}

    def readable(split: Split) -> dict[str, int]:
        return replace(split, frames=tuple(frame for frame in split.frames if frame.name not in unreadable)).counts

    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "contract": contract.to_dict(),
        "contract_sha256": contract.sha256,
        "backbone": recipe.backbone,
        **({"teacher": dict(teacher)} if teacher else {}),
        "seed": recipe.seed,
        "device": device,
        "precision": precision,
        "data": {
            "folder": data.resolve().as_posix(),
            "frames": {split.name: readable(split) for split in splits},
            "unreadable": [{"file": failure.file, "error": str(failure.error)} for failure in failures],
            **({"reading": reading.to_dict()} if reading != DEFAULT_READ_OPTIONS else {}),
        },
        "versions": versions(),
        "git_commit": git_commit(),
    }


def write_run(
    folder: Path, known: Mapping[str, Any], history: Sequence[Epoch], recipe: Recipe, *, finished: bool
) -> None:
    """Write ``run.json``, ``metrics.csv`` and ``curves.png``, each file atomically.

    ``best`` in ``run.json`` is the epoch whose weights are the model, as the recipe's `model_epoch` chooses it.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    chosen = model_epoch(history, recipe) if history else None
    found = {"status": "finished" if finished else "running", "epochs": len(history)}
    write_json(folder / checkpoint.RUN, {**known, **found, "best": chosen.to_dict() if chosen else None})
    if chosen:
        rows = io.StringIO()
        table = csv.DictWriter(rows, [field.name for field in fields(Epoch)], lineterminator="\n")
        table.writeheader()
        table.writerows(epoch.to_dict() for epoch in history)
        write_bytes(folder / checkpoint.METRICS, rows.getvalue().encode())
        if finished or _age(folder / checkpoint.CURVES) > REDRAW_SECONDS:
            save(training_curves(history, chosen, known.get("progressive_epochs", 0)), folder / checkpoint.CURVES)


def _age(path: Path) -> float:
    """Return the seconds since a file was written; infinity if it is missing or its time lies in the future."""
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return math.inf
    return age if age >= 0 else math.inf


def git_commit() -> str | None:
    """Return the commit of EchoQuad's own checkout, ``-dirty`` if files differ; None for an installed wheel."""
    # Optional locks could block another git process in the same checkout.
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    try:
        # A virtual environment inside another project's checkout must not report that project's commit.
        _run([*git, "ls-files", "--error-unmatch", Path(__file__).name])
        return _run([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    except (OSError, subprocess.SubprocessError):
        return None


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
