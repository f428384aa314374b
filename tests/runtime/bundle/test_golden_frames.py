"""Golden frames: encoding, decoding, and archives that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bundle import golden_frames
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.golden_frames import GoldenFrames, encode_golden
from echoquad_runtime.errors import BundleError

Make = Callable[..., Path]


def small_golden(**changes: Any) -> GoldenFrames:
    frames = (np.zeros((4, 5), np.uint8), np.full((3, 2), 9, np.uint8))
    values: dict[str, Any] = {
        "names": ("a", "b"),
        "frames": frames,
        "logits": np.zeros((2, 4, 2), np.float32),
        "probabilities": np.full((2, 4, 2), 0.5, np.float32),
    }
    return GoldenFrames(**{**values, **changes})


def test_golden_frames_round_trip(tmp_path: Path, make_tiny_bundle: Make) -> None:
    golden = small_golden()
    found = Bundle(make_tiny_bundle(tmp_path, golden=golden)).read_golden()
    assert found.names == golden.names
    for one, other in zip(found.frames, golden.frames, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.probabilities, golden.probabilities)
    assert encode_golden(found) == encode_golden(golden)


@pytest.mark.parametrize(
    "golden",
    [
        b"",
        b"no zip",
        encode_golden(small_golden())[:-40],
        encode_golden(small_golden(names=("a", "b", "c"))),
        encode_golden(small_golden(names=(), frames=(), logits=np.zeros((0, 4, 2)), probabilities=np.zeros((0, 4, 2)))),
        encode_golden(small_golden(logits=np.zeros((2, 4, 3), np.float32))),
        encode_golden(small_golden(probabilities=np.zeros((2, 2), np.float32))),
        encode_golden(small_golden(frames=(np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)))),
        encode_golden(small_golden(names=np.array([{"a": 1}, None], object))),
        encode_golden(small_golden(logits=np.zeros((2, 4, 2), np.float64))),
        encode_golden(small_golden(probabilities=np.full((2, 4, 2), "0.5"))),
        encode_golden(small_golden(frames=(np.zeros((4, 5), np.float32), np.zeros((3, 2), np.uint8)))),
        encode_golden(small_golden(frames=(np.zeros((4, 1), np.uint8), np.zeros((3, 2), np.uint8)))),
    ],
    ids=[
        "empty",
        "text",
        "cut",
        "names",
        "none",
        "logits",
        "probabilities",
        "colour",
        "pickle",
        "float64",
        "text-outputs",
        "float-frame",
        "small frame",
    ],
)
def test_invalid_golden_frames_are_refused(tmp_path: Path, make_tiny_bundle: Make, golden: bytes) -> None:
    bundle = Bundle(make_tiny_bundle(tmp_path, golden=golden))
    with pytest.raises(BundleError, match=r"golden\.npz") as caught:
        bundle.read_golden()
    assert "\n" not in str(caught.value)


def test_golden_frames_larger_than_the_limit_are_refused(
    tmp_path: Path, make_tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = encode_golden(small_golden(frames=(np.zeros((5000, 500), np.uint8), np.zeros((3, 2), np.uint8))))
    assert len(golden) < 10_000
    bundle = Bundle(make_tiny_bundle(tmp_path, golden=golden))
    bundle.read_golden()
    monkeypatch.setattr(golden_frames, "_MAX_UNPACKED", 1 << 20)
    with pytest.raises(BundleError, match=r"golden\.npz cannot be parsed \(it unpacks to more than 1 MB\)"):
        bundle.read_golden()
