"""HTML reports: one self-contained file with every figure and number, rendered from the templates beside this module.

A report loads nothing and runs no script, so it opens without a network. Jinja escapes every name in it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.manifest import INTENDED_USE
from echoquad_runtime.storage.atomic import write_bytes

__all__ = ["write_report"]


def write_report(path: Path, template: str, **context: Any) -> None:
    """Render a template to a file.

    Parameters
    ----------
    path
        The HTML file.
    template
        Name of a file in ``templates``, without ``.html.j2``.
    context
        The variables of the template. A path given to its ``figure`` macro is a PNG file, which the report embeds.

    Raises
    ------
    OSError
        If a picture cannot be read.
    OutputError
        If the file cannot be written.
    """
    text = _environment().get_template(f"{template}.html.j2").render(context)
    # File names that are not UTF-8 contain lone surrogates.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, interval=_interval, percent=_percent, png_data_uri=_png_data_uri)
    environment.globals.update(intended_use=INTENDED_USE, version=__version__)
    return environment


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _png_data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
