"""The target folder of an export."""

from __future__ import annotations

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

__all__ = ["check_target"]

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
