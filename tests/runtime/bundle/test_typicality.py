"""Tests of the typicality of frames: their score, its thresholds, and bundles with and without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bundle.typicality import frame_typicality, typicality_threshold, typicality_thresholds


def test_frame_is_one_over_the_mean_distance_of_its_quadrants() -> None:
    assert frame_typicality(np.ones((1, 4), np.float32)) == pytest.approx([1])
    found = frame_typicality(np.array([[1, 1, 1, 0.1], [0.5, 0.25, 1, 1]], np.float32))
    assert found == pytest.approx([4 / 13, 4 / 8]) and found.dtype == np.float64
    assert frame_typicality(np.array([[1, 1, 1, 1e-9]]))[0] < 1e-8  # one quadrant of another thing is enough


def test_thresholds_keep_the_expected_share_of_new_frames() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(400):
        thresholds = typicality_thresholds(rng.normal(size=199))
        new = rng.normal(size=2000)
        shares.append([(new < thresholds[name]).mean() for name in ("95", "99")])
    assert np.mean(shares, axis=0) == pytest.approx([0.05, 0.01], abs=0.002)
    assert typicality_thresholds(np.arange(199.0)) == {"95": 9.0, "99": 1.0}


def test_with_few_frames_the_least_typical_one_is_the_threshold() -> None:
    assert typicality_thresholds(np.array([0.9, 0.7, 0.8])) == {"95": 0.7, "99": 0.7}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"thresholds": {"fp32": {"95": 0.7, "99": 0.5}, "int8": {"95": 0.6, "99": 0.4}}}, (0.5, 0.4, 0.5)),
        ({"thresholds": {"fp32": {"99": True}, "int8": "x"}}, (None, None, None)),
        ({}, (None, None, None)),
        (None, (None, None, None)),
        ([], (None, None, None)),
    ],
)
def test_threshold_is_that_of_the_precision_if_stated(stated: Any, expected: tuple[float | None, ...]) -> None:
    manifest = {"typicality": stated}
    found = tuple(typicality_threshold(manifest, precision) for precision in ("fp32", "int8", "bf16"))
    assert found == expected
    assert typicality_threshold({}, "fp32") is None
