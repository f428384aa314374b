"""Options that several commands share, so that they mean the same everywhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BatchSize",
    "BundleFolder",
    "Device",
    "DeviceName",
    "Method",
    "MethodName",
    "Precision",
    "Threads",
]


class DeviceName(StrEnum):
    """Devices by the names that --device takes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class MethodName(StrEnum):
    """Vote rules by the names that --method takes."""

    majority = "majority"
    average = "average"
    weighted = "weighted"


BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `echoquad export` wrote.")]
Device = Annotated[
    DeviceName,
    typer.Option("--device", help="Where to compute. auto takes CUDA where it works and says why if not."),
]
Method = Annotated[
    MethodName | None,
    typer.Option(
        "--method", metavar="RULE", help="Vote rule: majority, average or weighted; the contract's where not given."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision", metavar="NAME", help="Graph to run: fp32, fp16 or int8; the bundle's default where not given."
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, help="Frames, of four quadrants each, at a time.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="CPU threads; what affinity and cgroup allow where not given."),
]
