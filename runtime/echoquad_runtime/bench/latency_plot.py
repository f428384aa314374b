"""The latency histogram, drawn with Pillow: a deployment host has no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from echoquad_runtime.overlay.palette import BLUE, FAINT, GREEN, INK, LIGHT_BLUE, PINK, VERMILION, WHITE

__all__ = ["Histogram", "count_latencies", "draw_histogram"]

WIDTH, HEIGHT = 1200, 640  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 40, 190, 80  # margins around the bars
_MAX_BINS: Final = 80
_MIN_BINS: Final = 12  # so that a few equal latencies make a narrow bar
_TICKS: Final = 8  # approximate number
_MAX_P99_FACTOR: Final = 2.0  # times p99: larger latencies are counted, but not drawn to scale
_ROUND_STEPS: Final = (1.0, 2.0, 5.0, 10.0)
_MARK_COLOURS: Final = (GREEN, BLUE, PINK, VERMILION)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of latencies by bin.

    Attributes
    ----------
    from_ms, bin_ms
        Lower edge of the first bin, and width of every bin, in milliseconds.
    counts
        Frames per bin; a bin includes its lower edge.
    above
        Frames above the last bin.
    """

    from_ms: float
    bin_ms: float
    counts: tuple[int, ...]
    above: int

    @property
    def to_ms(self) -> float:
        """Upper edge of the last bin."""
        return self.from_ms + self.bin_ms * len(self.counts)


def count_latencies(latencies_ms: Sequence[float]) -> Histogram:
    """Count one or more latencies in bins of a round width, the first of which starts at a multiple of it.

    The bins end at the largest latency, but at most at twice the 99th percentile. Otherwise a single outlier would
    squeeze all other latencies into one bin.
    """
    values = np.asarray(latencies_ms, np.float64)
    low, high = values.min(), min(values.max(), _MAX_P99_FACTOR * np.percentile(values, 99))
    width = _round_step(max(high - low, 0.05 * high, 1e-3) / _MAX_BINS)
    first = math.floor(low / width)
    bins = math.floor(high / width) - first + 1
    first, bins = max(0, first - max(0, _MIN_BINS - bins) // 2), max(_MIN_BINS, bins)
    numbers = np.floor(values / width).astype(np.int64) - first
    inside = numbers < bins
    counts = np.bincount(np.clip(numbers[inside], 0, None), minlength=bins)
    return Histogram(first * width, width, tuple(counts.tolist()), int((~inside).sum()))


def draw_histogram(latencies_ms: Sequence[float], marks: Mapping[str, float], title: str, detail: str) -> Image.Image:
    """Draw the histogram of latencies, with a line and a label for each mark.

    Parameters
    ----------
    latencies_ms
        One or more latencies in milliseconds, one per frame.
    marks
        Milliseconds by name, such as ``p99``; up to four.
    title, detail
        Two lines of text above the bars.

    Returns
    -------
    RGB image
        `WIDTH` by `HEIGHT` pixels.
    """
    histogram = count_latencies(latencies_ms)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), WHITE)
    draw = ImageDraw.Draw(canvas)
    large, text = _font(26), _font(17)
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    across, most = (right - _LEFT) / len(histogram.counts), max(histogram.counts)

    draw.text((_LEFT, 18), title, fill=INK, font=large)
    draw.text((_LEFT, 54), detail, fill=INK, font=text)
    upward = _round_step(most / 4, whole=True)
    scale = (bottom - _TOP) / (upward * math.ceil(most / upward))
    for count in range(0, upward * math.ceil(most / upward) + 1, upward):
        y = bottom - count * scale
        draw.line((_LEFT, y, right, y), fill=FAINT)
        draw.text((_LEFT - 10, y), f"{count:g}", fill=INK, font=text, anchor="rm")
    for index, count in enumerate(histogram.counts):
        if count:  # at least two pixels high, so that a single slow frame is visible
            x, y = _LEFT + index * across, min(bottom - count * scale, bottom - 2)
            draw.rectangle((x + 1, y, max(x + 1, x + across - 1), bottom), fill=LIGHT_BLUE)
    draw.line((_LEFT, bottom, right, bottom), fill=INK, width=2)

    def column(ms: float) -> float:
        return _LEFT + (ms - histogram.from_ms) / histogram.bin_ms * across

    step = _round_step((histogram.to_ms - histogram.from_ms) / _TICKS)
    for index in range(math.ceil(histogram.from_ms / step - 1e-9), math.floor(histogram.to_ms / step + 1e-9) + 1):
        x = column(index * step)
        draw.line((x, bottom, x, bottom + 6), fill=INK, width=2)
        draw.text((x, bottom + 12), f"{index * step:.6g}", fill=INK, font=text, anchor="mt")
    beyond = f"; {histogram.above} beyond the scale, on the right" if histogram.above else ""
    axis = f"latency, ms, in bins of {histogram.bin_ms:g} ms{beyond}"
    draw.text(((_LEFT + right) / 2, HEIGHT - 16), axis, fill=INK, font=text, anchor="mb")
    draw.text((_LEFT - 10, _TOP - 20), "frames", fill=INK, font=text, anchor="rm")

    for row, (name, ms) in enumerate(marks.items()):
        # Each mark has its own row, since p95 and p99 are often close.
        colour, y = _MARK_COLOURS[row % len(_MARK_COLOURS)], 92 + row * 23
        x = min(column(ms), right)
        draw.line((x, y + 9, x, bottom), fill=colour, width=2)
        label = f"{name} {ms:.1f} ms" + (" >" if ms > histogram.to_ms else "")
        room = x + 12 + draw.textlength(label, text) < WIDTH
        draw.text((x + 6 if room else x - 6, y), label, fill=colour, font=text, anchor="lm" if room else "rm")
    return canvas


def _round_step(least: float, *, whole: bool = False) -> Any:
    """Return the smallest of 1, 2, 5 times a power of ten that is not below `least`; at least 1 if `whole`."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    step = next(power * factor for factor in _ROUND_STEPS if power * factor >= least * (1 - 1e-9))
    return max(1, round(step)) if whole else step


def _font(size: float) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]  # Pillow's own union of its two font classes
