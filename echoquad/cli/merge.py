"""``echoquad merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from echoquad.cli.console import note
from echoquad.cli.declare import Argument, Option

__all__ = ["merge"]


def merge(
    shards: Annotated[
        list[Path],
        Argument(metavar="FILE", help="Result files of `echoquad predict --shard`, of all the shards, in any order."),
    ],
    out: Annotated[Path, Option("--out", metavar="FILE", help="Result file, of the shards' ending.")],
) -> None:
    """Merge the result files of shards into that of one run, row by row. Needs no bundle.

    A shard that is unfinished, damaged, missing, doubled, or of another run is refused.
    """
    from echoquad_runtime.results import shards as parts
    from echoquad_runtime.results.row_formats import format_for

    format_for(out)
    merged = parts.merge(shards, out)
    if not merged.complete:
        note("not every file has its .run.json beside it: whether a shard is missing cannot be told")
    note(f"{merged.rows} rows of {len(shards)} shards; wrote {out.as_posix()}")
