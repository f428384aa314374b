"""``echoquad merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echoquad.cli.framework.console import print_status

__all__ = ["merge"]


def merge(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Result files of all shards of `echoquad predict --shard`, in any order."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Result file to write, with the extension of the shards.")
    ],
) -> None:
    """Merge the result files of shards into the file of a single run, byte for byte. Needs no bundle.

    A shard that is unfinished, damaged, missing, given twice or from another run is refused.
    """
    from echoquad_runtime.results import shards
    from echoquad_runtime.results.row_formats import format_for

    format_for(out)
    merged = shards.merge(files, out)
    if not merged.complete:
        print_status("some files have no .run.json beside them: a missing shard cannot be detected")
    print_status(f"{merged.rows} rows of {len(files)} shards; wrote {out.as_posix()}")
