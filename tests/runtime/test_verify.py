from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bundle import GOLDEN, Bundle, Golden
from echoquad_runtime.errors import BundleError, BundleNotFoundError, BundleTamperedError
from echoquad_runtime.verify import verify

Make = Callable[..., Path]
LOOSE = {"max_abs_dprobability": 0.05, "max_frame_flip_fraction": 0.01}


def golden_of(folder: Path) -> Golden:
    return Bundle(folder).read_golden()


def gate(**bounds: float) -> dict[str, Any]:
    return {"fp32": {"gate": bounds}}


def test_a_good_bundle_passes(tiny_bundle: Path) -> None:
    found = verify(tiny_bundle, device="cpu")
    assert found.passed is True
    assert (found.device, found.precision, found.provider_note) == ("cpu", "fp32", "")
    assert (found.files, found.frames) == (3, len(golden_of(tiny_bundle).names))
    assert (found.frame_flips, found.quadrant_flips) == (0, 0)
    assert 0 < found.max_abs_dlogit < 1e-4  # numpy in float64 against onnxruntime in float32
    assert found.worst_frame in golden_of(tiny_bundle).names
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


@pytest.mark.parametrize("classes", [("A", "B", "C"), ("A", "B", "C", "D", "E")])
@pytest.mark.parametrize("vote", ["majority", "average", "weighted"])
def test_other_contracts_pass(tmp_path: Path, make_tiny_bundle: Make, classes: tuple[str, ...], vote: str) -> None:
    folder = make_tiny_bundle(tmp_path, classes=classes, vote=vote, keep=0.8, mean=0.3, std=0.2, temperature=1.7)
    assert verify(folder, device="cpu").passed


@pytest.mark.parametrize("frame", [0, 5])
@pytest.mark.parametrize(
    ("field", "delta"), [("logits", 2e-4), ("probabilities", 2e-4), ("logits", np.nan), ("probabilities", np.nan)]
)
def test_one_wrong_golden_answer_fails(
    tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make, frame: int, field: str, delta: float
) -> None:
    golden = golden_of(tiny_bundle)
    changed = getattr(golden, field).copy()
    changed[frame, 2, 1] += delta
    found = verify(make_tiny_bundle(tmp_path, golden=dataclasses.replace(golden, **{field: changed})), device="cpu")
    assert found.passed is False
    worst = found.max_abs_dlogit if field == "logits" else found.max_abs_dprobability
    assert worst == (np.inf if np.isnan(delta) else pytest.approx(delta, rel=0.1))
    if field == "probabilities":
        assert found.worst_frame == golden.names[frame]


def test_a_graph_that_computes_something_else_fails(tmp_path: Path, make_tiny_bundle: Make) -> None:
    found = verify(make_tiny_bundle(tmp_path, graph={"logit_scale": 1.01}), device="cpu")
    assert not found.passed
    assert found.max_abs_dlogit > 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "bounds", [{}, LOOSE, {**LOOSE, "max_abs_dprobability": 1e300, "max_frame_flip_fraction": 1.0}]
)
def test_no_gate_lets_nan_pass(tmp_path: Path, make_tiny_bundle: Make, value: float, bounds: dict[str, float]) -> None:
    changes = {"manifest": {"parity": gate(**bounds)}} if bounds else {}
    folder = make_tiny_bundle(tmp_path, graph={"logit_scale": value}, **changes)
    assert verify(folder, device="cpu").passed is False


def test_golden_answers_that_are_no_number_do_not_pass_where_logits_have_no_bound(
    tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make
) -> None:
    golden = golden_of(tiny_bundle)
    nan = dataclasses.replace(golden, logits=np.full_like(golden.logits, np.nan))
    folder = make_tiny_bundle(tmp_path, golden=nan, manifest={"parity": gate(**LOOSE)})
    assert verify(folder, device="cpu").passed is False


def test_flips_are_counted_and_fail(tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make) -> None:
    golden = golden_of(tiny_bundle)
    swapped = dataclasses.replace(golden, probabilities=golden.probabilities[:, :, ::-1])
    bounds = {"max_abs_dprobability": 1.0, "max_frame_flip_fraction": 0.5}
    found = verify(make_tiny_bundle(tmp_path, golden=swapped, manifest={"parity": gate(**bounds)}), device="cpu")
    assert not found.passed
    assert found.frame_flips > found.frames / 2
    assert found.quadrant_flips > 2 * found.frames
    assert found.frame_flips <= found.frames
    assert found.quadrant_flips <= 4 * found.frames


def test_a_gate_that_allows_them_lets_flips_pass(tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make) -> None:
    golden = golden_of(tiny_bundle)
    probabilities = golden.probabilities.copy()
    probabilities[1] = probabilities[1, :, ::-1]
    bounds = {"max_abs_dprobability": 1.0, "max_frame_flip_fraction": 1 / len(golden.names)}
    changed = dataclasses.replace(golden, probabilities=probabilities)
    found = verify(make_tiny_bundle(tmp_path, golden=changed, manifest={"parity": gate(**bounds)}), device="cpu")
    assert found.passed
    assert found.gate == bounds


def test_every_listed_file_is_hashed(tmp_path: Path, make_tiny_bundle: Make) -> None:
    for name in ("MODEL_CARD.md", GOLDEN, "model.int8.onnx"):
        folder = make_tiny_bundle(tmp_path / name, precisions=("fp32", "int8"))
        assert verify(folder, device="cpu").files == 4
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        with pytest.raises(BundleTamperedError, match=name):
            verify(folder, device="cpu")
        (folder / name).unlink()
        with pytest.raises(BundleError, match=name):
            verify(folder, device="cpu")


def test_the_precision_that_is_asked_for_is_verified(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path, precisions=("fp32", "int8"))
    assert verify(folder, device="cpu", precision="int8", threads=1).precision == "int8"


def test_no_bundle_and_no_gate(tmp_path: Path, make_tiny_bundle: Make) -> None:
    with pytest.raises(BundleNotFoundError):
        verify(tmp_path)
    with pytest.raises(BundleError, match="no parity gate"):
        verify(make_tiny_bundle(tmp_path, manifest={"parity": {}}), device="cpu")
