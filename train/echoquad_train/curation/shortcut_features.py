"""Shortcuts: whether a light model can tell the class from what is no heart, so that a heavy one will.

Three kinds of traces, each a few figures a frame:

``border``
    Grey levels outside the ultrasound field, on a grid of 32 x 32 cells: text, logos, menu bars, frames of a screen.
    The field is the convex hull of the largest patch that is brighter than black. A strip along the edge would not do:
    where the field fills the frame, as in CAMUS, it is anatomy, and tells end-systole at an AUC of 0.76.
``text``
    Strokes of letters, wherever they are: bright pixels that are dark a letter's stroke away to the left and right,
    counted on a grid of 12 x 12 cells. It sees text that is inside the field or the kept centre.
``file``
    Width, height, their ratio, mean brightness, bytes of the file and bytes a pixel; each also in eight bins, so that
    "either small or large" is seen.

For each, ridge regression on standardised figures, cross-validated by patient in five folds, gives an AUC for each
class against the rest (one for two classes). By the same folds, 199 permutations of the labels say what chance gives:
where a patient's frames are all of one class, patients change classes; where they are not, a patient's own frames do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from echoquad_runtime.quadrants import Grey

__all__ = ["KINDS", "MIN_AUC", "Shortcut", "Traces", "find_shortcuts", "traces_of"]

KINDS: Final[Mapping[str, str]] = {
    "border": "what is outside the ultrasound field",
    "text": "strokes of letters",
    "file": "frame size, mean brightness, file size",
}
MIN_AUC: Final = 0.60
"""AUC from which a shortcut is flagged, if it is more than chance: below it is of little use to a network."""
PERMUTATIONS: Final = 199  # so that the 99th percentile is the second largest
CHANCE: Final = 99.0  # percentile of the permuted AUCs
FOLDS: Final = 5
MIN_PATIENTS: Final = 4  # with frames of the class, and with others

_FIELD: Final = 64  # cells a side where the field is looked for
_BLACK: Final = 6  # mean grey level that is no field; scanners' black is 0 to 3
_BORDER: Final = 32  # cells a side of the border's picture
_CELLS: Final = 12  # cells a side where strokes are counted
_BRIGHT: Final = 200  # grey level of a stroke
_RISE: Final = 120  # grey levels by which it stands out
_BINS: Final = 8


@dataclass(frozen=True, slots=True)
class Traces:
    """A frame's figures: float32 [1024] of the border, [144] of text, [6] of the file."""

    border: npt.NDArray[np.float32]
    text: npt.NDArray[np.float32]
    file: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Shortcut:
    """What one kind of trace tells of a class.

    Attributes
    ----------
    kind
        ``border``, ``text`` or ``file``.
    name
        The class that is told from the rest; of two classes the second.
    auc
        Cross-validated by patient; None where there are too few patients.
    chance
        The 99th percentile of the AUC under permuted labels.
    """

    kind: str
    name: str
    auc: float | None
    chance: float | None
    patients: int

    @property
    def flagged(self) -> bool:
        """Whether the AUC is at least `MIN_AUC` and beyond chance."""
        return self.auc is not None and self.chance is not None and self.auc >= MIN_AUC and self.auc > self.chance

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return {
            "kind": self.kind,
            "class": self.name,
            "auc": None if self.auc is None else round(self.auc, 4),
            "chance_99": None if self.chance is None else round(self.chance, 4),
            "patients": self.patients,
            "flagged": self.flagged,
        }


def traces_of(grey: Grey, size: int) -> Traces:
    """Take the figures of a frame, uint8 [H, W], whose file has `size` bytes."""
    height, width = grey.shape
    file = np.array(
        [width, height, width / height, grey.mean(), np.log(max(size, 1)), size / (width * height)], np.float32
    )
    return Traces(_border(grey), _text(grey), file)


def find_shortcuts(
    traces: Sequence[Traces], labels: Sequence[str], patients: Sequence[str], seed: int = 0
) -> list[Shortcut]:
    """Measure what each kind of trace tells of each class.

    Parameters
    ----------
    traces, labels, patients
        Of F frames.
    seed
        Of the folds and the permutations.
    """
    classes = sorted(set(labels))
    wanted = classes[1:] if len(classes) == 2 else classes if len(classes) > 2 else []
    group = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)[1]
    found = []
    for kind in KINDS:
        figures = np.stack([getattr(trace, kind) for trace in traces]) if traces else np.zeros((0, 1), np.float32)
        figures = _binned(figures) if kind == "file" else figures
        for name in wanted:
            truth = np.array([label == name for label in labels])
            sides = [len(np.unique(group[truth])), len(np.unique(group[~truth]))]
            area, chance = _measure(figures, truth, group, seed) if min(sides) >= MIN_PATIENTS else (None, None)
            found.append(Shortcut(kind, name, area, chance, len(np.unique(group))))
    return found


def _measure(
    figures: npt.NDArray[np.float32], truth: npt.NDArray[np.bool_], group: npt.NDArray[np.intp], seed: int
) -> tuple[float, float]:
    from sklearn.linear_model import Ridge
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    columns = [truth, *(_permuted(truth, group, rng) for _ in range(PERMUTATIONS))]
    targets = np.stack(columns, axis=1).astype(np.float64)
    varied = figures[:, figures.std(axis=0) > 0].astype(np.float64)
    if not varied.shape[1]:  # every frame has the same: nothing can be told from it
        return 0.5, 0.5
    scores = np.empty_like(targets)
    # The penalty grows with the number of figures, so that of many no more is believed than of few.
    penalty = float(varied.shape[1])
    count = int(group.max()) + 1
    shuffled = rng.permutation(count)[group]  # GroupKFold deals out groups in the order of their numbers
    for seen, unseen in GroupKFold(min(FOLDS, count)).split(varied, groups=shuffled):
        scaler = StandardScaler().fit(varied[seen])
        model = Ridge(penalty).fit(scaler.transform(varied[seen]), targets[seen])
        scores[unseen] = model.predict(scaler.transform(varied[unseen]))
    areas = [float(roc_auc_score(targets[:, k] > 0.5, scores[:, k])) for k in range(targets.shape[1])]
    return areas[0], float(np.percentile(areas[1:], CHANCE))


def _permuted(
    truth: npt.NDArray[np.bool_], group: npt.NDArray[np.intp], rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Give labels as they could be by chance: see the module."""
    order = np.argsort(group, kind="stable")
    bounds = np.flatnonzero(np.diff(group[order])) + 1
    result = truth.copy()
    pure: list[npt.NDArray[np.intp]] = []
    for members in np.split(order, bounds):
        if len(set(truth[members].tolist())) > 1:
            result[members] = rng.permutation(truth[members])
        else:
            pure.append(members)
    for members, lender in zip(pure, rng.permutation(len(pure)), strict=True):
        result[members] = truth[pure[lender][0]]
    return result


def _border(grey: Grey) -> npt.NDArray[np.float32]:
    cells = np.asarray(Image.fromarray(grey).resize((_FIELD, _FIELD), Image.Resampling.BOX), np.float32)
    cells = np.where(_field(cells), np.float32(0), cells)
    step = _FIELD // _BORDER
    mean: npt.NDArray[np.float32] = cells.reshape(_BORDER, step, _BORDER, step).mean(axis=(1, 3))
    return mean.ravel()


def _field(cells: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Find the ultrasound field in a picture, float32 [64, 64], and a cell around it; none where all is black."""
    from scipy import ndimage
    from scipy.spatial import ConvexHull, QhullError

    patches, count = ndimage.label(ndimage.uniform_filter(cells, 3) > _BLACK)
    if not count:
        return np.zeros(cells.shape, bool)
    sizes = np.bincount(patches.ravel())[1:]
    points = np.argwhere(patches == 1 + int(sizes.argmax()))
    try:
        hull = points[ConvexHull(points).vertices]
    except (QhullError, ValueError):  # a point, a line
        return np.zeros(cells.shape, bool)
    image = Image.new("L", (_FIELD, _FIELD))
    ImageDraw.Draw(image).polygon([(int(x), int(y)) for y, x in hull], fill=1, outline=1)
    return np.asarray(ndimage.binary_dilation(np.asarray(image) > 0))


def _text(grey: Grey) -> npt.NDArray[np.float32]:
    reach = max(2, round(grey.shape[1] / 100))
    levels = grey.astype(np.int16)
    strokes = np.zeros(grey.shape, np.float32)
    if grey.shape[1] > 2 * reach:
        middle = levels[:, reach:-reach]
        rise = np.minimum(middle - levels[:, : -2 * reach], middle - levels[:, 2 * reach :])
        strokes[:, reach:-reach] = (rise >= _RISE) & (middle >= _BRIGHT)
    cells = Image.fromarray(strokes).resize((_CELLS, _CELLS), Image.Resampling.BOX)
    return np.sqrt(np.asarray(cells, np.float32)).ravel()  # a few letters count, many no more than they must


def _binned(figures: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Put beside each figure in which of eight bins it lies."""
    columns = [figures]
    for column in figures.T:
        edges = np.unique(np.quantile(column, np.arange(1, _BINS) / _BINS)) if len(column) else np.zeros(0)
        columns.append(np.eye(len(edges) + 1, dtype=np.float32)[np.searchsorted(edges, column, side="right")])
    return np.concatenate(columns, axis=1)
