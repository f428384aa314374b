"""Tests of class activation maps as colours over a frame."""

from __future__ import annotations

import numpy as np
from PIL import Image

from echoquad_runtime.overlay.activation_map import MAX_OPACITY, draw_activation_maps

BOXES = [(0, 0, 20, 10), (20, 0, 40, 10), (0, 10, 20, 20), (20, 10, 40, 20)]
COLOURS = ("#FF0000", "#0000FF", "#00FF00")


def frame() -> Image.Image:
    return Image.new("RGB", (44, 22), (100, 100, 100))


def maps(*levels: tuple[float, float, float]) -> np.ndarray:
    return np.array(levels, np.float32)[:, :, None, None] * np.ones((1, 1, 2, 2), np.float32)


def test_colour_and_opacity_follow_class_and_margin() -> None:
    heat = np.asarray(
        draw_activation_maps(
            frame(), maps((4.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1.0, 3.0)), BOXES, COLOURS
        )
    )
    grey = 100 * (1 - MAX_OPACITY)
    assert heat[5, 5].tolist() == [round(grey + 255 * MAX_OPACITY), round(grey), round(grey)]
    half = MAX_OPACITY / 2
    assert heat[5, 30].tolist() == [round(100 * (1 - half))] * 2 + [round(100 * (1 - half) + 255 * half)]
    assert heat[15, 5].tolist() == [100, 100, 100]  # no margin
    assert heat[15, 30].tolist() == [
        round(100 * (1 - half)),
        round(100 * (1 - half) + 255 * half),
        round(100 * (1 - half)),
    ]
    assert (heat[:, 40:] == 100).all() and (heat[20:] == 100).all()


def test_common_evidence_has_no_effect() -> None:
    some = np.random.default_rng(0).normal(size=(4, 3, 4, 4)).astype(np.float32)
    plain = np.asarray(draw_activation_maps(frame(), some, BOXES, COLOURS)).astype(int)
    shifted = np.asarray(draw_activation_maps(frame(), some + 7 * some[:, :1], BOXES, COLOURS)).astype(int)
    assert np.abs(plain - shifted).max() <= 1


def test_flat_maps_leave_frame_unchanged() -> None:
    untouched = draw_activation_maps(frame(), maps(*[(1.0, 1.0, 1.0)] * 4), BOXES, COLOURS)
    assert np.array_equal(np.asarray(untouched), np.asarray(frame()))


def test_colour_is_at_the_position_of_the_evidence() -> None:
    some = np.zeros((4, 2, 4, 4), np.float32)
    some[0, 0, 0, 3] = 1.0  # top right of the first quadrant
    heat = np.asarray(draw_activation_maps(frame(), some, BOXES, COLOURS[:2])).astype(int)
    red = heat[..., 0] - heat[..., 1]
    top, left = np.unravel_index(red.argmax(), red.shape)
    assert top < 4 and 15 <= left < 20
    assert (red[10:] == 0).all() and (red[:, 20:] == 0).all()
