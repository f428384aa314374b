"""The colour palette of overlays, plots and figures."""

from __future__ import annotations

from typing import Final

# The palette of Okabe and Ito, distinguishable with a colour vision deficiency. doi:10.1038/nmeth.1618
BLACK: Final = "#000000"
ORANGE: Final = "#E69F00"
SKY_BLUE: Final = "#56B4E9"
GREEN: Final = "#009E73"
YELLOW: Final = "#F0E442"
BLUE: Final = "#0072B2"
VERMILION: Final = "#D55E00"
PINK: Final = "#CC79A7"

CLASS_COLOURS: Final = (ORANGE, SKY_BLUE, GREEN, YELLOW, PINK, VERMILION, BLUE)
"""Colours of the classes on an overlay, by class index."""

# Neutral colours.
WHITE: Final = "#FFFFFF"
SILVER: Final = "#C8CDD2"
SLATE: Final = "#9AA4AE"
GREY: Final = "#7F7F7F"
FAINT: Final = "#D8DDE2"
LIGHT_BLUE: Final = "#9DB7CF"
INK: Final = "#20262C"
BAND: Final = "#101418"
