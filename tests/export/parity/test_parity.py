"""Parity: comparison of logits, probabilities and decisions, and the gates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from echoquad_export.parity.parity import (
    BATCH_SIZES,
    GATES,
    BatchParity,
    Gate,
    Parity,
    compare,
    measure_parity,
)
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.contract import Contract, canonical_json
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import infer_in_batches
from echoquad_runtime.errors import ParityError
from echoquad_train.data.dataset import load_quadrants, read_split
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.runs.checkpoint import load_run

TWO = Contract(("a", "b"), input_size=8)


def answers(p: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and probabilities [F * 4, 2] for probabilities of class a, [F, 4]."""
    a = np.array(p, np.float64).reshape(-1, 1)
    probabilities = np.concatenate([a, 1 - a], axis=1)
    return np.log(probabilities).astype(np.float32), probabilities.astype(np.float32)


def test_equal_answers_have_no_differences() -> None:
    one = answers([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]])
    assert compare(one, one, TWO, 5) == BatchParity(5, 0.0, 0.0, 0, 0, None)


def test_changed_votes_and_margins_on_a_hand_computed_case() -> None:
    reference = answers([[0.9, 0.9, 0.52, 0.1], [0.3, 0.3, 0.45, 0.3]])
    found = answers([[0.9, 0.9, 0.48, 0.1], [0.3, 0.3, 0.55, 0.3]])
    # Frame 0: 3 to 1 votes become 2 to 2, and the mean keeps class a. Frame 1: the decision stays.
    result = compare(reference, found, TWO, 2)
    assert (result.batch_size, result.patch_flips, result.frame_flips) == (2, 2, 0)
    assert result.max_abs_dprobability == pytest.approx(0.1, abs=1e-6)
    assert result.max_abs_dlogit == pytest.approx(np.log(0.55 / 0.45), abs=1e-5)
    assert result.smallest_margin_at_flip == pytest.approx(0.04, abs=1e-6)  # 0.52 - 0.48; the other margin is 0.10


def test_frame_decision_follows_the_vote_rule_of_the_contract() -> None:
    """The quadrants' labels stay; the mean crosses 0.5."""
    reference, found = answers([[0.9, 0.45, 0.4, 0.3]]), answers([[0.8, 0.45, 0.4, 0.3]])
    assert compare(reference, found, TWO, 1).frame_flips == 0
    averaged = Contract(("a", "b"), input_size=8, vote="average")
    result = compare(reference, found, averaged, 1)
    assert (result.patch_flips, result.frame_flips) == (0, 1)
    assert result.smallest_margin_at_flip == pytest.approx(0.1, abs=1e-6)  # smallest lead of the frame's quadrants
    weighted = Contract(("a", "b"), input_size=8, vote="weighted", vote_weights=(0, 1, 0, 0))
    assert compare(reference, found, weighted, 1).frame_flips == 0


def test_compare_with_three_classes() -> None:
    contract = Contract(("a", "b", "c"), input_size=8)
    reference = np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]], np.float32)
    found = reference.copy()
    found[1] = [0.35, 0.4, 0.25]
    result = compare((reference, reference), (found, found), contract, 1)
    assert (result.patch_flips, result.frame_flips) == (1, 1)  # two votes for a become one; b gets two
    assert result.smallest_margin_at_flip == pytest.approx(0.05, abs=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["export", "training code", "both"])
@pytest.mark.parametrize("part", [0, 1])
def test_nan_and_infinity_raise_parity_error(value: float, side: str, part: int) -> None:
    pair = [answers([[0.9] * 4, [0.2] * 4]) for _ in range(2)]
    for index, name in ((0, "training code"), (1, "export")):
        if side in (name, "both"):
            pair[index][part][5, 1] = value
    result = compare(pair[0], pair[1], TWO, 1)
    parity = Parity("fp32", "cpu", 2, "test", GATES["fp32"], (result,))
    assert not parity.passed
    canonical_json(parity.to_dict()["gate"])
    with pytest.raises(ParityError):
        parity.require()


def parity_of(gate: Gate, frames: int = 200, **changes: Any) -> Parity:
    found = {"max_abs_dlogit": 0.0, "max_abs_dprobability": 0.0, "patch_flips": 0, "frame_flips": 0}
    batches = tuple(
        BatchParity(batch_size=size, smallest_margin_at_flip=None, **(found | (changes if size == 5 else {})))
        for size in BATCH_SIZES
    )
    return Parity("fp32", "cpu", frames, "validation split", gate, batches)


@pytest.mark.parametrize(
    ("precision", "changes", "passes"),
    [
        ("fp32", {}, True),
        ("fp32", {"max_abs_dlogit": 1e-4}, True),
        ("fp32", {"max_abs_dlogit": 1.01e-4}, False),
        ("fp32", {"patch_flips": 1}, False),
        ("fp32", {"frame_flips": 1}, False),
        ("fp32", {"max_abs_dlogit": float("nan")}, False),
        ("fp16", {"max_abs_dlogit": 3.0, "patch_flips": 40, "frame_flips": 2, "max_abs_dprobability": 0.05}, True),
        ("fp16", {"frame_flips": 3}, False),  # more than 1 % of 200
        ("int8", {"max_abs_dprobability": 0.051}, False),
        ("int8", {"max_abs_dprobability": float("nan")}, False),
    ],
)
def test_default_gates(precision: str, changes: dict[str, Any], passes: bool) -> None:
    parity = parity_of(GATES[precision], **changes)
    assert parity.passed == passes
    if passes:
        parity.require()
        return
    with pytest.raises(ParityError) as error:
        parity.require()
    message = str(error.value)
    assert error.value.exit_code == 3 and "\n" not in message
    assert "at batch 5" in message and "200 frames of the validation split" in message and "no bundle" in message


def test_gate_to_dict_omits_missing_bounds() -> None:
    assert GATES["fp32"].to_dict() == {
        "max_abs_dlogit": 1e-4,
        "max_abs_dprobability": 1e-4,
        "max_frame_flip_fraction": 0.0,
        "max_patch_flip_fraction": 0.0,
        "max_rel_dtypicality": 1e-3,
    }
    assert GATES["fp16"].to_dict() == GATES["int8"].to_dict() == {
        "max_rel_dtypicality": 0.5,
        "max_abs_dprobability": 0.05,
        "max_frame_flip_fraction": 0.01,
    }  # fmt: skip


def test_worst_covers_all_batch_sizes_and_to_dict_lists_each() -> None:
    parity = parity_of(GATES["fp16"], max_abs_dprobability=0.02)
    assert parity.worst("max_abs_dprobability") == 0.02
    found = parity.to_dict()
    assert [batch["batch_size"] for batch in found["batches"]] == list(BATCH_SIZES) == [1, 2, 5, 16]
    assert found["passed"] and found["frames"] == 200 and found["gate"] == GATES["fp16"].to_dict()


def test_frames_run_in_batches_of_the_given_size() -> None:
    seen = []

    class Counting:
        contract, device, precision = TWO, "cpu", "fp32"

        def infer(self, quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            assert quadrants.dtype == np.uint8 and quadrants.flags.c_contiguous
            seen.append(quadrants.shape)
            first = quadrants[:, 0, 0, :2].astype(np.float32)
            return first, first / first.sum(axis=1, keepdims=True)

    quadrants = np.random.default_rng(0).integers(1, 256, (7, 4, 8, 8), np.uint8)
    logits, _ = infer_in_batches(Counting(), quadrants, 5)
    assert seen == [(20, 1, 8, 8), (8, 1, 8, 8)]
    np.testing.assert_array_equal(logits, quadrants.reshape(28, 8, 8)[:, 0, :2])
    seen.clear()
    steps: list[tuple[int, int]] = []
    parity = measure_parity(
        infer_in_batches(Counting(), quadrants, 3), Counting(), quadrants, "test", progress=lambda *s: steps.append(s)
    )
    assert parity.passed and parity.gate == GATES["fp32"] and steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bundle_decides_as_the_training_code(case: Any, other_case: Any, thin: None) -> None:
    for made in (case, other_case):
        run = load_run(made.run)
        store = load_quadrants(read_split(made.data, "validation", run.contract.classes), run.contract)
        torch_engine = TorchEngine(run.model, run.contract)
        onnx_engine = OnnxEngine(Bundle(made.bundle), device="cpu")
        reference = infer_in_batches(torch_engine, store.quadrants, 3)
        parity = measure_parity(reference, onnx_engine, store.quadrants, "validation split")
        assert parity.passed and parity.worst("max_abs_dlogit") < 2e-5
        other = infer_in_batches(torch_engine, np.flip(store.quadrants, axis=0).copy(), 3)
        assert not measure_parity(other, onnx_engine, store.quadrants, "validation split").passed
