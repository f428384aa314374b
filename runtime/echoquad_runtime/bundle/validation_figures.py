"""The validation figures: how a model's decisions were distributed on the validation frames, to notice a drift.

Export measures them with the exported graph, for each precision, and stores them as `VALIDATION` in the manifest, so
that they are hashed and signed with the bundle. They are counts of frames and hold no frame, name or label. Bundles of
earlier releases have none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from echoquad_runtime.contract import QUADRANTS
from echoquad_runtime.errors import BundleError

__all__ = ["STEPS", "Distribution", "ValidationFigures", "design_effect"]

STEPS: Final = 20
"""Steps of the table of undecided frames: it has the thresholds 0, 0.05 and so on to 1."""

_REQUIRED: Final = (
    *("frames", "effective_frames", "confidence", "agreement", "flags", "undecided", "undecided_or_unlike"),
)
_MAX_FRAMES: Final = 1 << 40
_MAX_VALUE: Final = 1e300
_MAX_BINS: Final = 100
_MAX_FLAGS: Final = 100
_MAX_FLAG: Final = 40  # characters


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram of frames.

    Attributes
    ----------
    edges
        E finite values in ascending order. A bin holds its lower edge; the first and the last bin have no end.
    counts
        E + 1 numbers of frames.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def bin_of(self, value: float) -> int:
        """Return the index of the bin that holds a value."""
        return bisect_right(self.edges, value)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"edges": list(self.edges), "counts": list(self.counts)}


@dataclass(frozen=True, slots=True)
class ValidationFigures:
    """The decisions of one precision on the validation frames, by the contract's vote and without abstaining.

    Attributes
    ----------
    frames
        Number of frames that were decided.
    effective_frames
        Number of independent frames that tell as much about the distributions: frames of one patient are alike. At
        most `frames`.
    confidence, typicality
        Histograms of `Prediction.confidence` and of the typicality; None if the model has no typicality score.
    agreement
        Number of frames of which 0, 1, 2, 3 and 4 quadrants vote as the frame is decided.
    flags
        Number of frames that have a flag, by flag; one that no frame has is left out.
    undecided
        Number of frames with a confidence lower than 0, 1/20, 2/20 and so on to 1.
    undecided_or_unlike
        The same, of frames that have such a confidence or are unlike the training frames.
    """

    frames: int
    effective_frames: float
    confidence: Distribution
    typicality: Distribution | None
    agreement: tuple[int, ...]
    flags: Mapping[str, int]
    undecided: tuple[int, ...]
    undecided_or_unlike: tuple[int, ...]

    def undecided_share(self, abstain_below: float | None, *, abstain_unlike: bool = False) -> float:
        """Return the share of frames on which a predictor with these settings abstains.

        Parameters
        ----------
        abstain_below
            Confidence below which it abstains, 0 to 1; None is never. Between two steps the share is interpolated.
        abstain_unlike
            Whether it abstains on frames unlike the training frames.
        """
        counts = self.undecided_or_unlike if abstain_unlike else self.undecided
        position = STEPS * min(max(abstain_below or 0.0, 0.0), 1.0)
        step = min(int(position), STEPS - 1)
        return (counts[step] + (position - step) * (counts[step + 1] - counts[step])) / self.frames

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values: the form that they have in the manifest."""
        return {
            "frames": self.frames,
            "effective_frames": self.effective_frames,
            "confidence": self.confidence.to_dict(),
            **({} if self.typicality is None else {"typicality": self.typicality.to_dict()}),
            "agreement": list(self.agreement),
            "flags": dict(sorted(self.flags.items())),
            "undecided": list(self.undecided),
            "undecided_or_unlike": list(self.undecided_or_unlike),
        }

    @classmethod
    def from_dict(cls, content: object, label: str) -> ValidationFigures:
        """Return checked figures from a manifest.

        Parameters
        ----------
        content
            Untrusted.
        label
            Begins the error messages.

        Raises
        ------
        BundleError
            If a field is missing or unknown, a value has the wrong type, or the counts contradict each other.
        """
        found = _object(content, _REQUIRED, label, optional=("typicality",))
        frames = _count(found["frames"], f"{label}.frames")
        if not frames:
            _fail(f"{label}.frames", "expected at least 1")
        effective = _number(found["effective_frames"], f"{label}.effective_frames")
        if not 0 < effective <= frames:
            _fail(f"{label}.effective_frames", "expected a number above 0 and at most the number of frames")
        flags = found["flags"]
        if not isinstance(flags, dict) or len(flags) > _MAX_FLAGS:
            _fail(f"{label}.flags", f"expected an object with at most {_MAX_FLAGS} flags")
        for name, count in flags.items():
            if not 0 < len(name) <= _MAX_FLAG or not name.isascii() or not name.isprintable():
                _fail(f"{label}.flags", f"expected names of 1 to {_MAX_FLAG} printable characters")
            _count(count, f"{label}.flags.{name}", frames)
        return cls(
            frames=frames,
            effective_frames=effective,
            confidence=_distribution(found["confidence"], frames, f"{label}.confidence"),
            typicality=_distribution(found["typicality"], frames, f"{label}.typicality")
            if "typicality" in found
            else None,
            agreement=_partition(found["agreement"], len(QUADRANTS) + 1, frames, f"{label}.agreement"),
            flags=dict(flags),
            undecided=_ascending_counts(found["undecided"], frames, f"{label}.undecided"),
            undecided_or_unlike=_ascending_counts(found["undecided_or_unlike"], frames, f"{label}.undecided_or_unlike"),
        )


def design_effect(groups: npt.NDArray[np.floating]) -> float:
    """Return by how much the frames within groups are alike: frames divided by this are the independent ones.

    The groups' histograms are tested for homogeneity; chi-square by its degrees of freedom is about 1 for independent
    frames, and 1 + (n - 1) r for groups of n frames with the correlation r (J. N. K. Rao and A. J. Scott, "The
    Analysis of Categorical Data from Complex Sample Surveys", JASA 76, 1981).

    Parameters
    ----------
    groups
        [G, B], frames of each of G groups in each of B bins; every group has some.

    Returns
    -------
    float
        An estimate, which can be less than 1 by chance. The size of the group if there is only one.
    """
    sizes, totals = groups.sum(axis=1), groups.sum(axis=0)
    used = totals > 0
    if len(groups) < 2:
        return max(float(sizes.sum()), 1.0)
    count, freedom = float(sizes.sum()), (len(groups) - 1) * (int(used.sum()) - 1)
    if not freedom or count <= 1:
        return 1.0
    expected = sizes[:, None] * totals[used] / count
    chi_square = float(((groups[:, used] - expected) ** 2 / expected).sum())
    mean = freedom * count / (count - 1)  # of independent frames, given the sums of rows and columns
    return chi_square / mean


def _distribution(content: object, frames: int, where: str) -> Distribution:
    found = _object(content, ("edges", "counts"), where)
    edges = [_number(edge, f"{where}.edges") for edge in _list(found["edges"], f"{where}.edges")]
    if not 1 <= len(edges) < _MAX_BINS or any(a >= b for a, b in pairwise(edges)):
        _fail(f"{where}.edges", f"expected 1 to {_MAX_BINS - 1} numbers in ascending order")
    return Distribution(tuple(edges), _partition(found["counts"], len(edges) + 1, frames, f"{where}.counts"))


def _partition(content: object, length: int, frames: int, where: str) -> tuple[int, ...]:
    """Return counts of parts into which all frames fall."""
    counts = [_count(value, where, frames) for value in _list(content, where)]
    if len(counts) != length or sum(counts) != frames:
        _fail(where, f"expected {length} numbers of frames that add up to all {frames}")
    return tuple(counts)


def _ascending_counts(content: object, frames: int, where: str) -> tuple[int, ...]:
    counts = [_count(value, where, frames) for value in _list(content, where)]
    if len(counts) != STEPS + 1 or counts != sorted(counts):
        _fail(where, f"expected {STEPS + 1} numbers of frames in ascending order")
    return tuple(counts)


def _object(content: object, required: Sequence[str], where: str, optional: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(content, dict) or not set(required) <= content.keys() <= {*required, *optional}:
        _fail(where, f"expected an object with {', '.join(required)}")
    return content


def _list(content: object, where: str) -> list[Any]:
    if not isinstance(content, list):
        _fail(where, "expected a list")
    return content


def _count(value: object, where: str, most: int = _MAX_FRAMES) -> int:
    if type(value) is not int or not 0 <= value <= most:  # bool is a subclass of int
        _fail(where, f"expected numbers of frames, 0 to {most}")
    return value


def _number(value: object, where: str) -> float:
    # Comparing refuses NaN, and does not overflow for an integer of hundreds of digits.
    if not isinstance(value, int | float) or isinstance(value, bool) or not -_MAX_VALUE < value < _MAX_VALUE:
        _fail(where, "expected finite numbers")
    return float(value)


def _fail(where: str, message: str) -> NoReturn:
    raise BundleError(f"{where}: {message}; export the bundle again")
