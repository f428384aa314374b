"""Place: a bundle is written beside its target and takes the target's name when it is whole, or never."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from echoquad_runtime.bundle.manifest import (
    GOLDEN,
    MANIFEST,
    MODEL_CARD,
    PRECISIONS,
    SIGNATURE,
    frame_graph_file,
    model_file,
)
from echoquad_runtime.errors import OutputError
from echoquad_runtime.storage.atomic import make_folder, output_errors

__all__ = ["beside", "check_target", "move_into_place"]

_FILE_MANAGERS: Final = (".DS_Store", "Thumbs.db", "desktop.ini")  # what these leave wherever they look


def check_target(out: Path) -> None:
    """Refuse a target that holds anything but an older bundle: what lies in it is removed with it."""
    if not out.exists():
        return
    label = out.as_posix()
    found = {entry.name for entry in out.iterdir()} if out.is_dir() else {out.name}
    if found and not (out / MANIFEST).is_file():
        raise OutputError(f"{label}: is there and is no bundle; it is left as it is; choose another --out")
    graphs = {name(precision) for precision in PRECISIONS for name in (model_file, frame_graph_file)}
    others = sorted(found - {MANIFEST, GOLDEN, MODEL_CARD, SIGNATURE, *graphs, *_FILE_MANAGERS})
    if others:
        raise OutputError(
            f"{label}: holds {', '.join(others[:6])} beside a bundle; it is left as it is; move that away, or choose "
            "another --out"
        )


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Make a folder of the name of `out` in a hidden one beside it, removed when the block ends, however it ends.

    Of the same name, since a signature keeps the name of the folder that was signed.
    """
    make_folder(out.parent)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    place = partial / out.name
    with output_errors(partial):
        place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_into_place(partial: Path, out: Path) -> None:
    """Rename over an older bundle. No system renames over a full folder, so the old one steps aside first."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.replaced")
    with output_errors(out):
        held = out.exists()
        if held:
            out.rename(aside)
        try:
            partial.rename(out)
        except BaseException:
            if held and not out.exists():
                aside.rename(out)
            raise
    shutil.rmtree(aside, ignore_errors=True)
