"""Plot style: palette and line styles of all figures, and writing a figure without display or pyplot state."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from echoquad_runtime.overlay.palette import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY_BLUE, VERMILION
from echoquad_runtime.storage.atomic import write_atomically

__all__ = ["BLUE", "GREY", "VERMILION", "save", "short", "stroke"]

_CLASSES = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY_BLUE, BLACK)
_STYLES = ("-", "--", "-.")

_LONGEST = 28  # characters of a class name in a figure


def stroke(index: int) -> tuple[str, str]:
    """Return the colour and line style of a class index; they repeat after 21 classes."""
    return _CLASSES[index % len(_CLASSES)], _STYLES[index // len(_CLASSES) % len(_STYLES)]


def short(name: str, longest: int = _LONGEST) -> str:
    """Shorten a class name for a figure; its end is kept, where long names often differ."""
    tail = longest // 3
    return name if len(name) <= longest else f"{name[: longest - 1 - tail]}…{name[-tail:]}"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a class may be called A$B$C
    with write_atomically(path) as stream, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
        figure.savefig(stream, format="png", dpi=150)
