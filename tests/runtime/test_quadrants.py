"""Quadrants: crop, split and stitch, the resize of Pillow, and the network's input."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.errors import FrameError, FrameTooSmallError
from echoquad_runtime.quadrants import crop_box, frame_quadrants, quadrant_boxes, resize, split, stitch

NOISE = np.random.default_rng(0).integers(0, 256, (211, 317), np.uint8)

GOLDEN_ROW = [0, 1, 3, 4, 6, 7, 9, 10]
GOLDEN_SUMS = [3416, 4184, 11096, 11864]

sides = st.integers(2, 400)
keeps = st.floats(0, 1, exclude_min=True)


def counted(width: int, height: int) -> np.ndarray:
    """Return a frame, uint8 [height, width], whose neighbouring pixels differ."""
    return (np.arange(width * height) * 37 % 256).astype(np.uint8).reshape(height, width)


# ---------------------------------------------------------------------------------------------- crop and split


@given(sides, sides, keeps)
def test_stitched_quadrants_equal_the_crop(width: int, height: int, keep: float) -> None:
    frame = counted(width, height)
    left, top, right, bottom = crop_box(width, height, keep)
    np.testing.assert_array_equal(stitch(*split(frame, keep)), frame[top:bottom, left:right])


@given(sides, sides, keeps)
def test_boxes_tile_the_crop(width: int, height: int, keep: float) -> None:
    covered = np.zeros((height, width), int)
    boxes = quadrant_boxes(width, height, keep)
    for left, top, right, bottom in boxes:
        assert left < right
        assert top < bottom
        covered[top:bottom, left:right] += 1
    left, top, right, bottom = crop_box(width, height, keep)
    assert covered[top:bottom, left:right].min() == 1
    assert covered.sum() == (right - left) * (bottom - top)


@given(sides, sides, keeps)
def test_crop_is_centred_and_keeps_the_fraction(width: int, height: int, keep: float) -> None:
    left, top, right, bottom = crop_box(width, height, keep)
    for side, low, high in ((width, left, right), (height, top, bottom)):
        assert 0 <= low < high <= side
        assert high - low == max(2, int(side * keep + 0.5))
        assert (side - high) - low in (0, 1)  # an odd border pixel is at the right or bottom


@given(sides, sides, keeps)
def test_right_and_lower_quadrants_get_the_odd_pixel(width: int, height: int, keep: float) -> None:
    la, ra, lv, rv = split(counted(width, height), keep)
    assert la.shape[0] == ra.shape[0]
    assert la.shape[1] == lv.shape[1]
    assert rv.shape[0] - la.shape[0] in (0, 1)
    assert rv.shape[1] - la.shape[1] in (0, 1)
    assert (lv.shape[0], ra.shape[1]) == rv.shape


@given(sides, sides)
def test_keep_of_1_is_no_crop(width: int, height: int) -> None:
    assert crop_box(width, height, 1.0) == (0, 0, width, height)


@pytest.mark.parametrize(
    ("size", "keep", "boxes"),
    [
        ((320, 240), 0.9, ((16, 12, 160, 120), (160, 12, 304, 120), (16, 120, 160, 228), (160, 120, 304, 228))),
        ((7, 5), 1.0, ((0, 0, 3, 2), (3, 0, 7, 2), (0, 2, 3, 5), (3, 2, 7, 5))),
        ((319, 241), 0.9, ((16, 12, 159, 120), (159, 12, 303, 120), (16, 120, 159, 229), (159, 120, 303, 229))),
        ((2, 2), 0.1, ((0, 0, 1, 1), (1, 0, 2, 1), (0, 1, 1, 2), (1, 1, 2, 2))),
    ],
)
def test_boxes_of_given_sizes(size: tuple[int, int], keep: float, boxes: Any) -> None:
    assert quadrant_boxes(*size, keep) == boxes


def test_order_is_la_ra_lv_rv() -> None:
    la, ra, lv, rv = split(np.array([[1, 2], [3, 4]], np.uint8), 1.0)
    assert (la.item(), ra.item(), lv.item(), rv.item()) == (1, 2, 3, 4)


def test_quadrants_are_views() -> None:
    assert all(np.shares_memory(NOISE, quadrant) for quadrant in split(NOISE, 0.9))


@pytest.mark.parametrize("size", [(0, 0), (1, 1), (1, 100), (100, 1), (0, 5)])
def test_frame_too_small_for_four_quadrants_is_refused(size: tuple[int, int]) -> None:
    width, height = size
    with pytest.raises(FrameTooSmallError, match=f"{width}x{height} pixels; expected at least 2x2") as caught:
        frame_quadrants(np.zeros((height, width), np.uint8), Contract(classes=("A", "B")))
    assert isinstance(caught.value, FrameError)


# ---------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("size", [8, 32, 64, 224])
@pytest.mark.parametrize("keep", [0.85, 0.9, 1.0])
def test_quadrant_is_resized_as_a_separate_image(size: int, keep: float) -> None:
    for quadrant in split(NOISE, keep):
        stream = io.BytesIO()
        Image.fromarray(quadrant.copy()).save(stream, "PNG")
        image = Image.open(stream).convert("L").resize((size, size), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(resize(quadrant, size), np.asarray(image))


def filter_columns(image: np.ndarray, size: int) -> np.ndarray:
    """Filter the columns of uint8 [h, w] as Pillow's Resample.c does, with weights of 22 fractional bits."""
    scale = image.shape[1] / size
    support = max(scale, 1.0)
    columns = np.empty((image.shape[0], size), np.int64)
    for x in range(size):
        centre = (x + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), image.shape[1])
        places = np.arange(first, last)
        weights = np.maximum(1 - np.abs((places - centre + 0.5) / support), 0)
        bits = np.floor(weights / weights.sum() * 2**22 + 0.5).astype(np.int64)
        columns[:, x] = (image[:, first:last].astype(np.int64) @ bits + 2**21) >> 22
    return np.clip(columns, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(300, 40), (260, 70), (90, 60), (40, 300), (31, 9), (9, 31)])
def test_columns_are_filtered_first_with_every_pillow(shape: tuple[int, int]) -> None:
    quadrant = np.random.default_rng(shape[0]).integers(0, 256, shape, np.uint8)
    expected = filter_columns(filter_columns(quadrant, 24).T.copy(), 24).T
    np.testing.assert_array_equal(resize(quadrant, 24), expected)


def test_resizing_a_box_of_the_frame_differs() -> None:
    # Pillow's box= lets the filter read beyond the quadrant's edge, so it must not replace the crop.
    boxes = quadrant_boxes(317, 211, 0.9)
    for quadrant, box in zip(split(NOISE, 0.9), boxes, strict=True):
        other = np.asarray(Image.fromarray(NOISE).resize((64, 64), Image.Resampling.BILINEAR, box=box))
        assert (resize(quadrant, 64) != other).any()


def test_quadrant_of_input_size_is_unchanged() -> None:
    quadrant = NOISE[10:42, 20:52]
    np.testing.assert_array_equal(resize(quadrant, 32), quadrant)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(8, 64), st.integers(0, 255))
def test_flat_quadrant_stays_flat(width: int, height: int, size: int, level: int) -> None:
    found = resize(np.full((height, width), level, np.uint8), size)
    np.testing.assert_array_equal(found, np.full((size, size), level))


def test_resize_yields_golden_values() -> None:
    # 12 x 10 grey levels, keep 1, to 8 x 8. Fixed values reveal a Pillow that computes differently.
    frame = (np.arange(120).reshape(10, 12) * 2).astype(np.uint8)
    found = frame_quadrants(frame, Contract(classes=("A", "B"), keep=1.0, input_size=8))
    np.testing.assert_array_equal(found[0, 0, 0], GOLDEN_ROW)
    assert [int(quadrant.sum()) for quadrant in found] == GOLDEN_SUMS


# ---------------------------------------------------------------------------------------------- the network's input


def test_frame_quadrants_resizes_each_quadrant() -> None:
    contract = Contract(classes=("A", "B"), input_size=48)
    found = frame_quadrants(NOISE, contract)
    assert (found.shape, found.dtype) == ((4, 1, 48, 48), np.uint8)
    for plane, quadrant in zip(found, split(NOISE, contract.keep), strict=True):
        np.testing.assert_array_equal(plane[0], resize(quadrant, 48))


@given(st.integers(1, 150), st.integers(1, 150), st.integers(8, 90), st.sampled_from([0.7, 0.9, 1.0]))
def test_merged_resize_equals_separate_resizes(width: int, height: int, size: int, keep: float) -> None:
    # Quadrants of equal shape are resized as four channels of one image, others one by one.
    for wide, high in ((2 * width, 2 * height), (2 * width + 1, 2 * height), (2 * width, 2 * height + 1)):
        frame = NOISE[:high, :wide] if high <= 211 and wide <= 317 else np.resize(NOISE, (high, wide))
        found = frame_quadrants(frame, Contract(classes=("A", "B"), input_size=size, keep=keep))
        for plane, quadrant in zip(found, split(frame, keep), strict=True):
            np.testing.assert_array_equal(plane[0], resize(quadrant, size))


def test_merged_resize_equals_reference_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = NOISE[:200, :300]
    expected = [filter_columns(filter_columns(quadrant, 24).T.copy(), 24).T for quadrant in split(frame, 1.0)]
    monkeypatch.setattr("echoquad_runtime.quadrants.resize", lambda *_: pytest.fail("resized separately"))
    found = frame_quadrants(frame, Contract(classes=("A", "B"), input_size=24, keep=1.0))
    np.testing.assert_array_equal(found[:, 0], expected)


def test_frame_quadrants_writes_in_place() -> None:
    contract = Contract(classes=("A", "B"), input_size=16)
    batch = np.full((3, 4, 1, 16, 16), 7, np.uint8)
    found = frame_quadrants(NOISE, contract, out=batch[1])
    assert np.shares_memory(found, batch)
    np.testing.assert_array_equal(batch[1], frame_quadrants(NOISE, contract))
    assert (batch[[0, 2]] == 7).all()


@pytest.mark.parametrize(
    "frame", [np.asfortranarray(NOISE), NOISE[::-1, ::-1], NOISE[::2, ::3]], ids=["F", "flip", "step"]
)
def test_memory_layout_does_not_matter(frame: np.ndarray) -> None:
    contract = Contract(classes=("A", "B"), input_size=16)
    np.testing.assert_array_equal(frame_quadrants(frame, contract), frame_quadrants(frame.copy(order="C"), contract))


def test_frame_is_not_modified() -> None:
    before = NOISE.copy()
    found = frame_quadrants(NOISE, Contract(classes=("A", "B"), input_size=16))
    found[:] = 0
    np.testing.assert_array_equal(NOISE, before)


# ---------------------------------------------------------------------------------------------- quadrant layout

layouts = st.permutations(QUADRANTS).map(tuple)


@given(sides, sides, keeps, layouts)
def test_quadrant_has_the_pixels_of_its_position(width: int, height: int, keep: float, layout: tuple[str, ...]) -> None:
    frame = counted(width, height)
    left, top, right, bottom = crop_box(width, height, keep)
    x, y = left + (right - left) // 2, top + (bottom - top) // 2
    at = (frame[top:y, left:x], frame[top:y, x:right], frame[y:bottom, left:x], frame[y:bottom, x:right])
    for name, quadrant in zip(QUADRANTS, split(frame, keep, layout), strict=True):
        np.testing.assert_array_equal(quadrant, at[layout.index(name)])
    np.testing.assert_array_equal(stitch(*split(frame, keep, layout), layout=layout), frame[top:bottom, left:right])


@given(st.integers(2, 60), st.integers(2, 60), keeps, layouts)
def test_layout_permutes_the_input_and_nothing_else(
    width: int, height: int, keep: float, layout: tuple[str, ...]
) -> None:
    """Odd sides matter: quadrants of several sizes are resized one by one, and those of one size together."""
    frame = counted(width, height)
    reference = Contract(("a", "b"), keep=keep, input_size=16)
    changed = Contract(("a", "b"), keep=keep, input_size=16, quadrants=layout)
    order = [layout.index(name) for name in QUADRANTS]
    np.testing.assert_array_equal(frame_quadrants(frame, changed), frame_quadrants(frame, reference)[order])
