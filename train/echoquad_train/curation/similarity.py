"""Near duplicates: pairs of frames that are one picture, re-encoded, brightened, resized or cropped.

The search has two stages. The first compares perceptual hashes (``imagehash.phash``, 256 bits) of each frame and of
views of it without some of its border, so that it also proposes cropped copies. The second aligns the two pictures and
correlates their fine detail. Apical views resemble each other at low resolution. Speckle tells them apart: it differs
between any two moments of a heart, and a copy keeps it.

The thresholds come from the 900 CAMUS frames of 450 patients and from copies of 150 of these (figures in
``docs/reference/audit.md``): copies correlate at 0.93 or more, a patient's frames at end-diastole and end-systole at
0.85 or less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from echoquad_runtime.quadrants import Grey

__all__ = [
    "CENTRED",
    "MAX_HASH_DISTANCE",
    "MIN_SIMILARITY",
    "SHIFTED",
    "HashBits",
    "NearDuplicate",
    "View",
    "near_duplicates",
    "perceptual_hashes",
    "similarity",
    "thumbnail",
]

View = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of a picture, as fractions of its width and height."""

HashBits = npt.NDArray[np.bool_]
IndexArray = npt.NDArray[np.intp]

FULL_VIEW: Final[View] = (0.0, 0.0, 1.0, 1.0)
CENTRED: Final[tuple[View, ...]] = (FULL_VIEW, *((m / 2, m / 2, 1 - m / 2, 1 - m / 2) for m in (0.04, 0.08)))
"""The picture, and its centre without 4 and 8 % of each side."""
SHIFTED: Final[tuple[View, ...]] = (
    FULL_VIEW,
    *(
        (m * x, m * y, 1 - m * (1 - x), 1 - m * (1 - y))
        for m in (0.03, 0.06, 0.09)
        for x in (0.0, 0.5, 1.0)
        for y in (0.0, 0.5, 1.0)
    ),
)
"""The picture, and crops of 3, 6 and 9 % in nine positions each: from all sides equally, or from some sides only."""

SIDE: Final = 128  # pixels of a thumbnail
HASH: Final = 16  # bits a side of the perceptual hash
MAX_HASH_DISTANCE: Final = 40
"""Differing bits, of 256, up to which two hashes make a candidate."""
MIN_SIMILARITY: Final = 0.90
"""Correlation of fine detail from which two frames are near duplicates."""

_DETAIL: Final = 64  # pixels a side at which detail is compared
_FINE: Final = 2.0  # pixels: sigma of the blur that is subtracted
_FLOOR: Final = 3.0  # grey levels of contrast below which detail is coding noise
_HOPELESS: Final = 0.45  # correlation below which no alignment is searched
_STEPS: Final = (0.02, 0.01, 0.005)  # of the alignment search, as fractions of the side
_BLOCK: Final = 1 << 26  # comparisons at a time: 256 MB


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two frames that are one picture: their indices, hash distance in bits of 256, and correlation of detail."""

    first: int
    second: int
    distance: int
    similarity: float


def thumbnail(grey: Grey) -> Grey:
    """Resize a frame, uint8 [H, W], to a square, uint8 [128, 128], regardless of its aspect ratio."""
    return np.asarray(Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def perceptual_hashes(thumb: Grey, views: Sequence[View]) -> HashBits:
    """Return the perceptual hash of each view of a thumbnail, bool [V, 256].

    A hash compares each of the 16 x 16 lowest frequencies of the view, at 64 x 64 pixels, to their median.
    """
    import imagehash

    image = Image.fromarray(thumb)
    return np.stack([imagehash.phash(_crop(image, view), HASH).hash.ravel() for view in views])


def similarity(first: Grey, second: Grey, view: View = FULL_VIEW) -> float:
    """Return the correlation of the detail of two thumbnails at their best alignment.

    Parameters
    ----------
    first, second
        uint8 [128, 128].
    view
        The part of `first` that may equal `second`. Its edges are moved as long as the correlation grows.

    Returns
    -------
    float
        In [-1, 1]; 0 if one of them has no detail.
    """
    image, target = Image.fromarray(first), _detail(Image.fromarray(second), FULL_VIEW)
    best = float(_detail(image, view) @ target)
    if best < _HOPELESS:
        return best
    for step in _STEPS:
        moved = True
        while moved:
            moved = False
            for other in _neighbours(view, step):
                value = float(_detail(image, other) @ target)
                if value > best + 1e-4:
                    best, view, moved = value, other, True
    return best


def near_duplicates(
    bits: Sequence[HashBits],
    thumb: Callable[[int], Grey],
    views: Sequence[View],
    compared: Callable[[IndexArray, IndexArray], npt.NDArray[np.bool_]],
    limit: int,
) -> tuple[list[NearDuplicate], int]:
    """Find the frames that are near duplicates.

    The pairs form trees: two frames that are already connected through others are not compared.

    Parameters
    ----------
    bits
        F times bool [V, 256]; see `perceptual_hashes`.
    thumb
        Returns the thumbnail of a frame index.
    views
        The views of `bits`; the first is the full picture.
    compared
        Selects the pairs to compare, by two arrays of frame indices.
    limit
        Maximum number of candidates to align, in order of hash distance.

    Returns
    -------
    pairs, unchecked
        The near duplicates, and the number of candidates beyond `limit`.
    """
    candidates = sorted(_candidates(np.stack(bits), compared)) if len(bits) > 1 else []
    parents = list(range(len(bits)))
    pairs: list[NearDuplicate] = []
    for number, (distance, full, part, view) in enumerate(candidates):
        if number >= limit:
            return pairs, len(candidates) - number
        if _root(parents, full) == _root(parents, part):
            continue
        value = similarity(thumb(part), thumb(full), views[view])
        if value >= MIN_SIMILARITY:
            parents[_root(parents, full)] = _root(parents, part)
            pairs.append(NearDuplicate(min(full, part), max(full, part), distance, value))
    return pairs, 0


def _candidates(
    bits: HashBits, compared: Callable[[IndexArray, IndexArray], npt.NDArray[np.bool_]]
) -> Iterator[tuple[int, int, int, int]]:
    """Yield hash distance, index of the full frame, index of the cropped frame and view; once for each pair."""
    count, views, width = bits.shape
    signs = np.where(bits, np.float32(1), np.float32(-1))
    full_signs = np.ascontiguousarray(signs[:, 0])
    nearest: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    rows = max(1, _BLOCK // (count * views))
    for start in range(0, count, rows):
        block = signs[start : start + rows]
        # The product of signs is the number of equal bits less that of different bits.
        agreed = (block.reshape(-1, width) @ full_signs.T).reshape(len(block), views, count)
        view = agreed.argmax(axis=1)
        distance = ((width - np.take_along_axis(agreed, view[:, None], 1)[:, 0]) / 2).round().astype(int)
        part, full = np.nonzero(distance <= MAX_HASH_DISTANCE)
        kept = (part + start != full) & compared(part + start, full)
        for p, f in zip(part[kept].tolist(), full[kept].tolist(), strict=True):
            candidate = (int(distance[p, f]), f, p + start, int(view[p, f]))
            key = (min(f, p + start), max(f, p + start))
            nearest[key] = min(candidate, nearest.get(key, candidate))
    yield from nearest.values()


def _root(parents: list[int], index: int) -> int:
    """Return the root of an index in a union-find forest, halving the path."""
    while parents[index] != index:
        parents[index] = index = parents[parents[index]]
    return index


def _neighbours(view: View, step: float) -> Iterator[View]:
    """Yield the view shifted in each direction, then with each edge moved."""
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


def _crop(image: Image.Image, view: View) -> Image.Image:
    left, top, right, bottom = (SIDE * edge for edge in view)
    return image.resize((_DETAIL, _DETAIL), Image.Resampling.BILINEAR, (left, top, right, bottom))


def _detail(image: Image.Image, view: View) -> npt.NDArray[np.float32]:
    """Return a view's detail, float32 [4096] of mean 0 and length 1: unsharp mask divided by the local contrast."""
    from scipy.ndimage import gaussian_filter

    grey = np.asarray(_crop(image, view), np.float32)
    detail = grey - gaussian_filter(grey, _FINE)
    detail /= np.sqrt(gaussian_filter(detail * detail, 2 * _FINE) + _FLOOR**2)
    flat = (detail - detail.mean()).ravel()
    length = float(np.linalg.norm(flat))
    # A uniform frame has no detail; it is similar to nothing.
    return flat / np.float32(length) if length > 1e-3 else np.zeros_like(flat)
