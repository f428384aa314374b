"""A histogram of latencies as a picture, drawn with Pillow alone: a cart has no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Histogram", "count_latencies", "draw_histogram"]

WIDTH, HEIGHT = 1200, 640  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 40, 190, 80  # margins around the bars
_BINS: Final = 80  # at most; their width is a round number
_FEWEST: Final = 12  # bins: a few equal latencies are a narrow bar and no wall
_TICKS: Final = 8  # about
_FARTHEST: Final = 2.0  # times p99: what lies beyond is counted, and not drawn to scale
_ROUND: Final = (1.0, 2.0, 5.0, 10.0)

_INK, _FAINT, _PAPER, _BAR = "#20262C", "#D8DDE2", "#FFFFFF", "#9DB7CF"
# Okabe and Ito's palette, which readers with a colour vision deficiency can tell apart. doi:10.1038/nmeth.1618
_COLOURS: Final = ("#009E73", "#0072B2", "#CC79A7", "#D55E00")


@dataclass(frozen=True, slots=True)
class Histogram:
    """Latencies, counted.

    Attributes
    ----------
    from_ms, bin_ms
        Where the first bin begins, and how wide each is, in milliseconds.
    counts
        Frames a bin; a bin holds its lower edge.
    above
        Frames beyond the last bin.
    """

    from_ms: float
    bin_ms: float
    counts: tuple[int, ...]
    above: int

    @property
    def to_ms(self) -> float:
        """Where the last bin ends."""
        return self.from_ms + self.bin_ms * len(self.counts)


def count_latencies(latencies_ms: Sequence[float]) -> Histogram:
    """Count latencies, one or more, in bins of a round width that begin at a multiple of it.

    The bins reach to the largest, but no farther than twice the 99th percentile: one frame that met a busy
    moment would else squeeze all the others into a single bin.
    """
    values = np.asarray(latencies_ms, np.float64)
    low, high = values.min(), min(values.max(), _FARTHEST * np.percentile(values, 99))
    width = _round_step(max(high - low, 0.05 * high, 1e-3) / _BINS)
    first = math.floor(low / width)
    bins = math.floor(high / width) - first + 1
    first, bins = max(0, first - max(0, _FEWEST - bins) // 2), max(_FEWEST, bins)
    numbers = np.floor(values / width).astype(np.int64) - first
    inside = numbers < bins
    counts = np.bincount(np.clip(numbers[inside], 0, None), minlength=bins)
    return Histogram(first * width, width, tuple(counts.tolist()), int((~inside).sum()))


def draw_histogram(latencies_ms: Sequence[float], marks: Mapping[str, float], title: str, detail: str) -> Image.Image:
    """Draw latencies as bars, with a line and a label for each mark.

    Parameters
    ----------
    latencies_ms
        One a frame, in milliseconds; one or more.
    marks
        Milliseconds by name, such as ``p99``; up to four.
    title, detail
        Two lines above the bars.

    Returns
    -------
    RGB image
        `WIDTH` by `HEIGHT` pixels.
    """
    found = count_latencies(latencies_ms)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    draw = ImageDraw.Draw(canvas)
    large, text = _font(26), _font(17)
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    across, most = (right - _LEFT) / len(found.counts), max(found.counts)

    draw.text((_LEFT, 18), title, fill=_INK, font=large)
    draw.text((_LEFT, 54), detail, fill=_INK, font=text)
    upward = _round_step(most / 4, whole=True)
    scale = (bottom - _TOP) / (upward * math.ceil(most / upward))
    for count in range(0, upward * math.ceil(most / upward) + 1, upward):
        y = bottom - count * scale
        draw.line((_LEFT, y, right, y), fill=_FAINT)
        draw.text((_LEFT - 10, y), f"{count:g}", fill=_INK, font=text, anchor="rm")
    for index, count in enumerate(found.counts):
        if count:  # two pixels at least: a single frame in a thousand is what one looks for
            x, y = _LEFT + index * across, min(bottom - count * scale, bottom - 2)
            draw.rectangle((x + 1, y, max(x + 1, x + across - 1), bottom), fill=_BAR)
    draw.line((_LEFT, bottom, right, bottom), fill=_INK, width=2)

    def column(ms: float) -> float:
        return _LEFT + (ms - found.from_ms) / found.bin_ms * across

    step = _round_step((found.to_ms - found.from_ms) / _TICKS)
    for index in range(math.ceil(found.from_ms / step - 1e-9), math.floor(found.to_ms / step + 1e-9) + 1):
        x = column(index * step)
        draw.line((x, bottom, x, bottom + 6), fill=_INK, width=2)
        draw.text((x, bottom + 12), f"{index * step:.6g}", fill=_INK, font=text, anchor="mt")
    beyond = f"; {found.above} beyond the scale, on the right" if found.above else ""
    axis = f"latency, ms, in bins of {found.bin_ms:g} ms{beyond}"
    draw.text(((_LEFT + right) / 2, HEIGHT - 16), axis, fill=_INK, font=text, anchor="mb")
    draw.text((_LEFT - 10, _TOP - 20), "frames", fill=_INK, font=text, anchor="rm")

    for row, (name, ms) in enumerate(marks.items()):
        colour, y = _COLOURS[row % len(_COLOURS)], 92 + row * 23  # a row each: p95 and p99 are often close
        x = min(column(ms), right)
        draw.line((x, y + 9, x, bottom), fill=colour, width=2)
        label = f"{name} {ms:.1f} ms" + (" >" if ms > found.to_ms else "")
        room = x + 12 + draw.textlength(label, text) < WIDTH
        draw.text((x + 6 if room else x - 6, y), label, fill=colour, font=text, anchor="lm" if room else "rm")
    return canvas


def _round_step(least: float, *, whole: bool = False) -> Any:
    """Give the smallest of 1, 2, 5, 10, 20, ... and their tenths and hundredths that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    step = next(power * factor for factor in _ROUND if power * factor >= least * (1 - 1e-9))
    return max(1, round(step)) if whole else step


def _font(size: float) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]  # Pillow's own union of its two font classes
