"""Drift: whether the latest decisions are distributed as those on the validation frames of the bundle.

Three histograms are compared by the population stability index (PSI): confidence, typicality and the number of
quadrants that agree with the decision. The share of frames with each flag, and that of ``INDETERMINATE``, are compared
by their difference.

**What counts as one.** Frames of a clip are alike, and so are clips of an examination. A result therefore counts once,
by the mean of its frames' histograms, whatever their number. Of a live source, one frame a minute counts. What is
still alike, as the objects of one examination are, lies side by side in the window: the window is cut into blocks, and
the noise is multiplied by their design effect, by how much neighbours differ from each other more than blocks of
independent objects do. The window has to cover many patients: of one patient alone, nothing can tell a drift from the
patient.

**Thresholds.** Without a drift, the PSI of n objects against m frames in k bins is about (1/n + 1/m) times a chi-square
variable with k - 1 degrees of freedom (B. Yurdakul and J. Naranjo, "Statistical properties of the population stability
index", Journal of Risk Model Validation 14(4), 2020). A quantity raises the alert beyond the quantile of this
distribution, and only if the difference matters: from a PSI of 0.2, or 5 points of a share.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.validation_figures import ValidationFigures, design_effect
from echoquad_runtime.contract import INDETERMINATE, QUADRANTS
from echoquad_runtime.frames.quality_flags import BLANK
from echoquad_runtime.predict.prediction import TIE
from echoquad_serve.monitoring.metrics import FLAGS

__all__ = ["MIN_PSI", "MIN_SHARE", "DriftMonitor", "chi_square_quantile", "stability_index"]

MIN_PSI: Final = 0.2
"""Population stability index from which a change is usually called large."""

MIN_SHARE: Final = 0.05
"""Difference in a share that matters."""

_OK: Final = "ok"  # state of a live source
_BLOCKS: Final = 10  # of the window
_MAX_ROWS: Final = 64  # of a result that are read; more frames of a clip say little more
_PRIOR: Final = 0.5  # frames that are added to each bin, so that an empty one has a logarithm

_T = TypeVar("_T")
Floats = npt.NDArray[np.float64]

logger = logging.getLogger(__name__)


class DriftMonitor:
    """Compares the latest decisions of one bundle with its validation figures. Methods may be called from any thread.

    A new bundle needs a new monitor. Nothing is stored on the disk: a monitor begins without a decision.

    Parameters
    ----------
    figures
        The figures of the precision that runs; None if the bundle states none, so that there is nothing to compare.
    vote
        The contract's vote rule, by which the figures are. Of rows by another rule, and of rows that are smoothed over
        several frames, only typicality and the flags of the frame are compared.
    abstain_below, abstain_unlike
        As those of the predictor: they determine how many frames are expected to be ``INDETERMINATE``.
    bundle_sha256
        Rows of another bundle are ignored, such as those that were being decided while bundles were swapped. Empty
        accepts all.
    window
        Number of objects that are compared, the latest ones.
    minimum
        Number of objects that state a quantity below which it raises no alert.
    live_every_s
        Seconds between two live frames that count.
    false_alarm_rate
        Chance that a quantity without a drift exceeds its threshold at a given moment.
    clock
        Returns seconds.
    """

    def __init__(
        self,
        figures: ValidationFigures | None,
        *,
        vote: str,
        abstain_below: float | None = None,
        abstain_unlike: bool = False,
        bundle_sha256: str = "",
        window: int = 1000,
        minimum: int = 100,
        live_every_s: float = 60.0,
        false_alarm_rate: float = 1e-4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._figures, self._vote, self._bundle = figures, vote, bundle_sha256
        self._minimum, self._live_every_s, self._clock = min(minimum, window), live_every_s, clock
        self._rate = false_alarm_rate
        self._lock = threading.Lock()
        self._live_next = -math.inf
        self._count = 0
        if figures is None:
            logger.warning("the bundle states no validation figures, so that drift is not monitored; export it again")
            return
        self._flags = tuple(sorted(FLAGS))
        self._histograms = {"confidence": figures.confidence.counts, "agreement": figures.agreement}
        if figures.typicality is not None:
            self._histograms["typicality"] = figures.typicality.counts
        self._shares = {f"flag:{flag}": figures.flags.get(flag, 0) / figures.frames for flag in self._flags}
        if abstain_below is not None or abstain_unlike:
            self._shares["indeterminate"] = figures.undecided_share(abstain_below, abstain_unlike=abstain_unlike)
        # A row of the table is an object: the mean of its frames in each bin and share; NaN where it states nothing.
        widths = {name: len(counts) for name, counts in self._histograms.items()} | dict.fromkeys(self._shares, 1)
        ends = np.cumsum(list(widths.values())).tolist()
        self._columns = {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)}
        self._table: Floats = np.full((window, ends[-1]), np.nan)

    def observe_result(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count the rows of a result, as one object. A value that is missing or odd is left out."""
        if self._figures is None:
            return
        chosen = rows[:: len(rows) // _MAX_ROWS + 1]
        encoded = [self._encode(row, self._figures) for row in chosen if self._is_of_bundle(row)]
        if not encoded:
            return
        stated = ~np.isnan(encoded)
        sums = np.where(stated, encoded, 0.0).sum(axis=0)
        counts = stated.sum(axis=0)
        if not counts.any():
            return
        mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        with self._lock:
            self._table[self._count % len(self._table)] = mean
            self._count += 1

    def observe_live(self, row: Mapping[str, Any]) -> None:
        """Count the row of a live frame as an object, if the one before is long enough ago.

        A frame without a picture does not count, nor one of a frozen source: nobody is examined.
        """
        if row.get("state", _OK) != _OK or BLANK in _flags(row, ()):
            return
        now = self._clock()
        with self._lock:
            if now < self._live_next:
                return
            self._live_next = now + self._live_every_s
        self.observe_result([row])

    def state(self) -> dict[str, Any] | None:
        """Return the comparison.

        Returns
        -------
        dict or None
            ``alert``, whether a quantity exceeds its threshold; ``frames``, the number of objects that are compared;
            ``quantities``: ``index`` and ``threshold`` by name, None where no object states the quantity. A flag that
            occurs nowhere is left out. None if the bundle states no validation figures.
        """
        figures = self._figures
        if figures is None:
            return None
        with self._lock:
            count, window = self._count, len(self._table)
            latest = self._table[np.arange(max(count - window, 0), count) % window]  # a copy, in the order of time
        quantities: dict[str, dict[str, float | None]] = {}
        alert = False
        for name, columns in self._columns.items():
            part = latest[:, columns]
            part = part[~np.isnan(part[:, 0])]
            if name.startswith("flag:") and not self._shares[name] and not part.any():
                continue
            if not len(part):
                quantities[name] = {"index": None, "threshold": None}
                continue
            if name in self._histograms:
                index, threshold = self._compare_histogram(part, self._histograms[name], figures)
            else:
                index, threshold = self._compare_share(part, self._shares[name], figures)
            quantities[name] = {"index": round(index, 6), "threshold": round(threshold, 6)}
            alert = alert or (index >= threshold and len(part) >= self._minimum)
        return {"alert": alert, "frames": len(latest), "quantities": quantities}

    # ------------------------------------------------------------------------------------------ rows

    def _is_of_bundle(self, row: Mapping[str, Any]) -> bool:
        return not self._bundle or row.get("bundle_sha256") == self._bundle

    def _encode(self, row: Mapping[str, Any], figures: ValidationFigures) -> Floats:
        """Return a row of the table, for one frame."""
        encoded = np.full(self._table.shape[1], np.nan)

        def put(name: str, index: int, value: float = 1.0) -> None:
            columns = self._columns[name]
            encoded[columns] = 0.0
            encoded[columns.start + index] = value

        comparable = row.get("method") == self._vote and row.get("smoothed_over", 1) == 1
        if (flags := _flags(row, None)) is not None:
            for flag in self._flags:
                if comparable or flag != TIE:
                    put(f"flag:{flag}", 0, float(flag in flags))
        if figures.typicality is not None and (score := _number(row.get("typicality"))) is not None:
            put("typicality", figures.typicality.bin_of(score))
        if not comparable:
            return encoded
        if (confidence := _number(row.get("confidence"))) is not None:
            put("confidence", figures.confidence.bin_of(confidence))
        label = row.get("pred_image")
        decided = row.get("predicted_class", label)
        votes = [row.get(f"pred_{quadrant}") for quadrant in QUADRANTS]
        if isinstance(decided, str) and decided != INDETERMINATE and None not in votes:
            put("agreement", votes.count(decided))
        if "indeterminate" in self._shares and isinstance(label, str):
            put("indeterminate", 0, float(label == INDETERMINATE))
        return encoded

    # ------------------------------------------------------------------------------------------ comparison

    def _compare_histogram(
        self, objects: Floats, expected: Sequence[int], figures: ValidationFigures
    ) -> tuple[float, float]:
        """Return the PSI of objects, [N, B], against the frames in each bin; and its threshold."""
        noise = _noise(objects, figures)
        threshold = chi_square_quantile(1 - self._rate, len(expected) - 1) * noise
        return stability_index(objects.sum(axis=0), expected), max(threshold, MIN_PSI)

    def _compare_share(self, objects: Floats, expected: float, figures: ValidationFigures) -> tuple[float, float]:
        """Return by how much the share of objects, [N, 1], differs from the expected one; and the threshold.

        The standard error has the pooled share of Agresti and Coull, with the squared normal quantile added to the
        objects: that of rare flags is not too small.
        """
        share = float(objects.mean())
        z = NormalDist().inv_cdf(1 - self._rate / 2)
        count, frames = len(objects), figures.effective_frames
        pooled = (share * count + expected * frames + z * z / 2) / (count + frames + z * z)
        noise = _noise(np.hstack([objects, 1 - objects]), figures)
        return abs(share - expected), max(z * math.sqrt(pooled * (1 - pooled) * noise), MIN_SHARE)


def _noise(objects: Floats, figures: ValidationFigures) -> float:
    """Return 1/n + 1/m for n independent objects and m independent validation frames.

    `objects`, [N, B], are in the order in which they came.
    """
    count = len(objects)
    blocks = np.array([block.sum(axis=0) for block in np.array_split(objects, min(_BLOCKS, count))])
    # Neighbours are compared, and not all: a drift that begins within the window is in one pair alone.
    effects = [design_effect(blocks[index : index + 2]) for index in range(len(blocks) - 1)]
    return max(1.0, float(np.mean(effects or [1.0]))) / count + 1 / figures.effective_frames


def stability_index(actual: Sequence[float] | Floats, expected: Sequence[float]) -> float:
    """Return the population stability index of two histograms, with half a frame added to each bin."""
    shares = [(np.asarray(counts, np.float64) + _PRIOR) for counts in (actual, expected)]
    p, q = (counts / counts.sum() for counts in shares)
    return float(((p - q) * np.log(p / q)).sum())


def chi_square_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of the chi-square distribution, by the approximation of Wilson and Hilferty (1931).

    In the upper tail it is at most 8 % too large for one degree of freedom, and 3 % for four or more.
    """
    z, part = NormalDist().inv_cdf(probability), 2 / (9 * freedom)
    return float(freedom * (1 - part + z * math.sqrt(part)) ** 3)


def _flags(row: Mapping[str, Any], default: _T) -> Sequence[object] | _T:
    flags = row.get("flags")
    return flags if isinstance(flags, list | tuple) else default


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e300 < value < 1e300:
        return None
    return float(value)
