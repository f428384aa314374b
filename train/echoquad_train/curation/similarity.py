"""Likeness: whether two frames are one picture, though one of them was stored anew, brightened, resized or cut.

Two looks. The first is quick and forgiving: perceptual hashes (``imagehash.phash``, 256 bits) of each frame and of
views of it that lack a little of its border, so that a cut copy is met as well. The second lays the two pictures over
each other, finds where they fit best, and correlates their fine detail. Apical frames all look alike from afar; what
tells them apart is speckle, which no two moments of a heart share and which a copy keeps.

Chosen on the 900 CAMUS frames of 450 patients and on copies of 150 of them (``docs/reference/audit.md`` has the
figures): copies correlate at 0.93 or more, a patient's frames at end-diastole and end-systole at 0.85 or less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.quadrants import Grey

__all__ = ["CENTRED", "DISTANCE", "LIKENESS", "SHIFTED", "Pair", "View", "alike", "hashes", "likeness", "thumbnail"]

View = tuple[float, float, float, float]
"""Left, top, right, bottom of a part of a picture, as fractions of its width and height."""

Bits = npt.NDArray[np.bool_]

WHOLE: Final[View] = (0.0, 0.0, 1.0, 1.0)
CENTRED: Final[tuple[View, ...]] = (WHOLE, *((m / 2, m / 2, 1 - m / 2, 1 - m / 2) for m in (0.04, 0.08)))
"""The picture, and its middle without 4 and 8 % of each side."""
SHIFTED: Final[tuple[View, ...]] = (
    WHOLE,
    *(
        (m * x, m * y, 1 - m * (1 - x), 1 - m * (1 - y))
        for m in (0.03, 0.06, 0.09)
        for x in (0.0, 0.5, 1.0)
        for y in (0.0, 0.5, 1.0)
    ),
)
"""The picture, and cut by 3, 6 and 9 % in nine ways each: on all sides alike, on some only."""

SIDE: Final = 128  # pixels of a thumbnail
HASH: Final = 16  # bits a side of the perceptual hash
DISTANCE: Final = 40
"""Bits of 256 in which hashes may differ at the first look."""
LIKENESS: Final = 0.90
"""Correlation of fine detail from which two frames are one picture."""

_DETAIL: Final = 64  # pixels a side where detail is compared
_FINE: Final = 2.0  # pixels: what is wider than that is no detail
_FLOOR: Final = 3.0  # grey levels of contrast below which detail is noise of the coding
_HOPELESS: Final = 0.45  # correlation below which no better fit is looked for
_STEPS: Final = (0.02, 0.01, 0.005)  # of the search for the best fit, as fractions of the side
_BLOCK: Final = 1 << 26  # comparisons at a time: 256 MB


@dataclass(frozen=True, slots=True)
class Pair:
    """Two frames that are one picture: indices, hash distance in bits of 256, correlation of their detail."""

    first: int
    second: int
    distance: int
    likeness: float


def thumbnail(grey: Grey) -> Grey:
    """Give a frame, uint8 [H, W], as a square picture, uint8 [128, 128]: of its shape nothing is left."""
    return np.asarray(Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def hashes(thumb: Grey, views: Sequence[View]) -> Bits:
    """Give the perceptual hash of each view of a thumbnail, bool [V, 256].

    The hash is of the 16 x 16 lowest frequencies of the view at 64 x 64: each against their median.
    """
    import imagehash

    image = Image.fromarray(thumb)
    return np.stack([imagehash.phash(_view(image, view), HASH).hash.ravel() for view in views])


def likeness(first: Grey, second: Grey, view: View = WHOLE) -> float:
    """Correlate the detail of two thumbnails where they fit best.

    Parameters
    ----------
    first, second
        uint8 [128, 128].
    view
        The part of `first` that `second` may be; its edges are then moved until the correlation grows no more.

    Returns
    -------
    float
        From -1 to 1; 0 where one has no detail.
    """
    image, wanted = Image.fromarray(first), _detail(Image.fromarray(second), WHOLE)
    best = float(_detail(image, view) @ wanted)
    if best < _HOPELESS:
        return best
    for step in _STEPS:
        moved = True
        while moved:
            moved = False
            for other in _neighbours(view, step):
                value = float(_detail(image, other) @ wanted)
                if value > best + 1e-4:
                    best, view, moved = value, other, True
    return best


def alike(
    bits: Sequence[Bits],
    thumb: Callable[[int], Grey],
    views: Sequence[View],
    compared: Callable[[npt.NDArray[np.intp], npt.NDArray[np.intp]], npt.NDArray[np.bool_]],
    looks: int,
) -> tuple[list[Pair], int]:
    """Find the frames that are one picture.

    Of frames that are found to be alike through others no pair is given: the pairs form trees.

    Parameters
    ----------
    bits
        F times bool [V, 256], see `hashes`.
    thumb
        Gives a frame's thumbnail.
    views
        Those of `bits`; the first is the whole picture.
    compared
        Tells of which pairs, by their indices, an answer is wanted.
    looks
        Second looks at most, nearest hashes first.

    Returns
    -------
    pairs, left
        The pairs, and at how many candidates no second look was taken.
    """
    candidates = sorted(_candidates(np.stack(bits), compared)) if len(bits) > 1 else []
    trees = list(range(len(bits)))
    pairs: list[Pair] = []
    for place, (distance, whole, part, view) in enumerate(candidates):
        if place >= looks:
            return pairs, len(candidates) - place
        if _root(trees, whole) == _root(trees, part):
            continue
        found = likeness(thumb(part), thumb(whole), views[view])
        if found >= LIKENESS:
            trees[_root(trees, whole)] = _root(trees, part)
            pairs.append(Pair(min(whole, part), max(whole, part), distance, found))
    return pairs, 0


def _candidates(
    bits: Bits, compared: Callable[[npt.NDArray[np.intp], npt.NDArray[np.intp]], npt.NDArray[np.bool_]]
) -> Iterator[tuple[int, int, int, int]]:
    """Give distance, the whole frame's index, the index of the one seen in part, and the view; one a pair."""
    count, views, width = bits.shape
    signs = np.where(bits, np.float32(1), np.float32(-1))
    wholes = np.ascontiguousarray(signs[:, 0])
    nearest: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    rows = max(1, _BLOCK // (count * views))
    for start in range(0, count, rows):
        block = signs[start : start + rows]
        # The product of signs counts what is equal, less what is not.
        agreed = (block.reshape(-1, width) @ wholes.T).reshape(len(block), views, count)
        view = agreed.argmax(axis=1)
        distance = ((width - np.take_along_axis(agreed, view[:, None], 1)[:, 0]) / 2).round().astype(int)
        part, whole = np.nonzero(distance <= DISTANCE)
        kept = (part + start != whole) & compared(part + start, whole)
        for p, w in zip(part[kept].tolist(), whole[kept].tolist(), strict=True):
            found = (int(distance[p, w]), w, p + start, int(view[p, w]))
            key = (min(w, p + start), max(w, p + start))
            nearest[key] = min(found, nearest.get(key, found))
    yield from nearest.values()


def _root(trees: list[int], index: int) -> int:
    while trees[index] != index:
        trees[index] = index = trees[trees[index]]
    return index


def _neighbours(view: View, step: float) -> Iterator[View]:
    """Move the view as a whole, then each edge."""
    left, top, right, bottom = view
    for by in (-step, step):
        for other in (
            (left + by, top, right + by, bottom),
            (left, top + by, right, bottom + by),
            (left + by, top, right, bottom),
            (left, top + by, right, bottom),
            (left, top, right + by, bottom),
            (left, top, right, bottom + by),
        ):
            if min(other) >= 0 and max(other) <= 1:
                yield other


def _view(image: Image.Image, view: View) -> Image.Image:
    left, top, right, bottom = (SIDE * edge for edge in view)
    return image.resize((_DETAIL, _DETAIL), Image.Resampling.BILINEAR, (left, top, right, bottom))


def _detail(image: Image.Image, view: View) -> npt.NDArray[np.float32]:
    """Give a view's detail, float32 [4096] of length 1 and mean 0: less its blur, by its own contrast near by."""
    from scipy.ndimage import gaussian_filter

    grey = np.asarray(_view(image, view), np.float32)
    detail = grey - gaussian_filter(grey, _FINE)
    detail /= np.sqrt(gaussian_filter(detail * detail, 2 * _FINE) + _FLOOR**2)
    flat = (detail - detail.mean()).ravel()
    length = float(np.linalg.norm(flat))
    # A flat frame has no detail that could agree with anything.
    return flat / np.float32(length) if length > 1e-3 else np.zeros_like(flat)
