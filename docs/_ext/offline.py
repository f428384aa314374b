"""Fail the build if a page loads anything from another host, such as a web font or a script."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError

LOADS = re.compile(
    r"""<(?:link\b(?![^>]*\brel="canonical")|script|img|iframe|source|video|audio|object)\b[^>]*"""
    r"""\b(?:href|src|srcset|data)=["']?(?:https?:)?//|url\(\s*["']?(?:https?:)?//|@import\s+["'](?:https?:)?//""",
    re.IGNORECASE,
)
"""What makes a browser fetch from another host; a plain hyperlink does not."""


def outside_requests(folder: Path) -> list[str]:
    """Return the pages and style sheets below `folder` that load from another host, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".html", ".css"))
    return [path.relative_to(folder).as_posix() for path in files if LOADS.search(path.read_text("utf-8"))]


def _check(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html" and (found := outside_requests(Path(app.outdir))):
        raise ExtensionError(f"these pages load from another host: {', '.join(found)}")


def setup(app: Any) -> dict[str, bool]:
    """Connect the check to the end of the build."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
