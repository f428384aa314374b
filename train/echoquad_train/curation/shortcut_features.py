"""Shortcut features: whether a light model predicts the class from anything but the heart.

If it can, a deep network will. Three groups of features are measured for each frame:

``border``
    Grey levels outside the ultrasound field, on a grid of 32 x 32 cells: text, logos, menu bars, screen borders. The
    field is the convex hull of the largest region brighter than black. A strip along the edge would not do: where the
    field fills the frame, as in CAMUS, it is anatomy and predicts end-systole with an AUC of 0.76.
``text``
    Strokes of letters anywhere, also inside the field: bright pixels that are dark one stroke width to the left and
    right, counted on a grid of 12 x 12 cells.
``file``
    Width, height, aspect ratio, mean brightness, file size and bytes per pixel; each also in eight bins, so that
    "either small or large" is detected.

Ridge regression on the standardised features, cross-validated by patient in five folds, gives an AUC for each class
against the rest (one for two classes). With the same folds, 199 permutations of the labels give the AUC of chance.
Patients whose frames are all of one class exchange classes; the frames of any other patient are permuted among
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from echoquad_runtime.quadrants import Grey

__all__ = ["KINDS", "MIN_AUC", "Shortcut", "ShortcutFeatures", "find_shortcuts", "shortcut_features"]

KINDS: Final[Mapping[str, str]] = {
    "border": "what is outside the ultrasound field",
    "text": "strokes of letters",
    "file": "frame size, mean brightness, file size",
}
MIN_AUC: Final = 0.60
"""AUC from which a shortcut that exceeds chance is flagged; a network gains little from a lower one."""
PERMUTATIONS: Final = 199  # so that the 99th percentile is the second largest
CHANCE: Final = 99.0  # percentile of the permuted AUCs
FOLDS: Final = 5
MIN_PATIENTS: Final = 4  # of the class, and of the others

_FIELD: Final = 64  # cells a side where the field is searched
_BLACK: Final = 6  # mean grey level up to which a cell is not field; scanners' black is 0 to 3
_BORDER: Final = 32  # cells a side of the border feature
_CELLS: Final = 12  # cells a side where strokes are counted
_BRIGHT: Final = 200  # grey level of a stroke
_RISE: Final = 120  # grey levels by which a stroke exceeds its surroundings
_BINS: Final = 8


@dataclass(frozen=True, slots=True)
class ShortcutFeatures:
    """A frame's features: float32 [1024] of the border, [144] of text, [6] of the file."""

    border: npt.NDArray[np.float32]
    text: npt.NDArray[np.float32]
    file: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Shortcut:
    """How well one group of features predicts a class.

    Attributes
    ----------
    kind
        ``border``, ``text`` or ``file``.
    class_name
        The class that is predicted against the rest; the second of two classes.
    auc
        Area under the ROC curve, cross-validated by patient; None if there are too few patients.
    chance
        99th percentile of the AUC under permuted labels.
    patients
        Number of patients.
    """

    kind: str
    class_name: str
    auc: float | None
    chance: float | None
    patients: int

    @property
    def flagged(self) -> bool:
        """Whether the AUC is at least `MIN_AUC` and exceeds chance."""
        return self.auc is not None and self.chance is not None and self.auc >= MIN_AUC and self.auc > self.chance

    def to_dict(self) -> dict[str, Any]:
        """Return the shortcut as JSON values."""
        return {
            "kind": self.kind,
            "class": self.class_name,
            "auc": None if self.auc is None else round(self.auc, 4),
            "chance_99": None if self.chance is None else round(self.chance, 4),
            "patients": self.patients,
            "flagged": self.flagged,
        }


def shortcut_features(grey: Grey, size: int) -> ShortcutFeatures:
    """Return the features of a frame, uint8 [H, W], whose file has `size` bytes."""
    height, width = grey.shape
    file = np.array(
        [width, height, width / height, grey.mean(), np.log(max(size, 1)), size / (width * height)], np.float32
    )
    return ShortcutFeatures(_border(grey), _text(grey), file)


def find_shortcuts(
    features: Sequence[ShortcutFeatures], labels: Sequence[str], patients: Sequence[str], seed: int = 0
) -> list[Shortcut]:
    """Measure how well each group of features predicts each class.

    The sequences hold the features, class name and patient of each frame; `seed` is that of folds and permutations.
    """
    classes = sorted(set(labels))
    predicted = classes if len(classes) > 2 else classes[1:]
    group = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)[1]
    shortcuts = []
    for kind in KINDS:
        values = np.stack([getattr(frame, kind) for frame in features]) if features else np.zeros((0, 1), np.float32)
        values = _with_bins(values) if kind == "file" else values
        for name in predicted:
            truth = np.array([label == name for label in labels])
            fewest = min(len(np.unique(group[truth])), len(np.unique(group[~truth])))
            auc, chance = _cross_validated_auc(values, truth, group, seed) if fewest >= MIN_PATIENTS else (None, None)
            shortcuts.append(Shortcut(kind, name, auc, chance, len(np.unique(group))))
    return shortcuts


def _cross_validated_auc(
    features: npt.NDArray[np.float32], truth: npt.NDArray[np.bool_], group: npt.NDArray[np.intp], seed: int
) -> tuple[float, float]:
    """Return the AUC of `truth` and the 99th percentile under permuted labels; `group` numbers the patients."""
    from sklearn.linear_model import Ridge
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    columns = [truth, *(_permuted(truth, group, rng) for _ in range(PERMUTATIONS))]
    targets = np.stack(columns, axis=1).astype(np.float64)
    varied = features[:, features.std(axis=0) > 0].astype(np.float64)
    if not varied.shape[1]:  # all frames are equal
        return 0.5, 0.5
    scores = np.empty_like(targets)
    # The penalty grows with the number of features, so that many features do not overfit more than few.
    penalty = float(varied.shape[1])
    count = int(group.max()) + 1
    shuffled = rng.permutation(count)[group]  # GroupKFold assigns groups in the order of their numbers
    for seen, unseen in GroupKFold(min(FOLDS, count)).split(varied, groups=shuffled):
        scaler = StandardScaler().fit(varied[seen])
        model = Ridge(penalty).fit(scaler.transform(varied[seen]), targets[seen])
        scores[unseen] = model.predict(scaler.transform(varied[unseen]))
    areas = [float(roc_auc_score(targets[:, k] > 0.5, scores[:, k])) for k in range(targets.shape[1])]
    return areas[0], float(np.percentile(areas[1:], CHANCE))


def _permuted(
    truth: npt.NDArray[np.bool_], group: npt.NDArray[np.intp], rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Return permuted labels; see the module docstring."""
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
    """Return the ultrasound field in cells, float32 [64, 64], dilated by one cell; an empty mask if all is black."""
    from scipy import ndimage
    from scipy.spatial import ConvexHull, QhullError

    regions, count = ndimage.label(ndimage.uniform_filter(cells, 3) > _BLACK)
    if not count:
        return np.zeros(cells.shape, bool)
    sizes = np.bincount(regions.ravel())[1:]
    points = np.argwhere(regions == 1 + int(sizes.argmax()))
    try:
        hull = points[ConvexHull(points).vertices]
    except (QhullError, ValueError):  # a point or a line
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
    return np.sqrt(np.asarray(cells, np.float32)).ravel()  # the square root lets a few letters count


def _with_bins(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Append a one-hot code of eight quantile bins for each feature."""
    columns = [features]
    for column in features.T:
        edges = np.unique(np.quantile(column, np.arange(1, _BINS) / _BINS)) if len(column) else np.zeros(0)
        columns.append(np.eye(len(edges) + 1, dtype=np.float32)[np.searchsorted(edges, column, side="right")])
    return np.concatenate(columns, axis=1)
