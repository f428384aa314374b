"""The style of all figures, and how one is written: without a display and without pyplot's global state."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from echoquad_runtime.overlay import palette
from echoquad_runtime.overlay.palette import BLACK, BLUE, GREEN, GREY, PINK, SKY_BLUE, VERMILION
from echoquad_runtime.storage.atomic import write_atomically

__all__ = ["BLUE", "GREY", "ORANGE", "save", "short", "stroke"]

ORANGE = VERMILION
_CLASSES = (BLUE, VERMILION, GREEN, PINK, palette.ORANGE, SKY_BLUE, BLACK)


_LONGEST = 28  # characters of a class's name in a figure


def stroke(index: int) -> tuple[str, str]:
    """Give the colour and the line style of the class of an index: 21 pairs, then from the beginning."""
    return _CLASSES[index % len(_CLASSES)], ("-", "--", "-.")[index // len(_CLASSES) % 3]


def short(name: str, longest: int = _LONGEST) -> str:
    """Shorten a class's name to what a figure has room for; long names often differ at their ends."""
    tail = longest // 3
    return name if len(name) <= longest else f"{name[: longest - 1 - tail]}…{name[-tail:]}"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a class may be called A$B$C
    with write_atomically(path) as stream, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box: of no harm
        figure.savefig(stream, format="png", dpi=150)
