"""Tests of verification: gates, changed decisions, hashes, and reports over devices and precisions."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.golden_frames import GoldenFrames
from echoquad_runtime.bundle.manifest import GOLDEN
from echoquad_runtime.devices.session_factory import open_session
from echoquad_runtime.engine.io_binding import IoBinding
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.errors import BundleError, BundleNotFoundError, BundleTamperedError, DeviceUnavailableError
from echoquad_runtime.verify.decision_margins import frame_margins
from echoquad_runtime.verify.verify import verify, verify_all

Make = Callable[..., Path]
LOOSE = {"max_abs_dprobability": 0.05, "max_frame_flip_fraction": 0.01}


def golden_of(folder: Path) -> GoldenFrames:
    return Bundle(folder).read_golden()


def gate(**bounds: float) -> dict[str, Any]:
    return {"fp32": {"gate": bounds}}


def test_good_bundle_passes(tiny_bundle: Path) -> None:
    found = verify(tiny_bundle, device="cpu")
    assert found.passed is True
    assert (found.device, found.precision, found.provider_note) == ("cpu", "fp32", "")
    assert (found.files, found.frames) == (3, len(golden_of(tiny_bundle).names))
    assert (found.frame_flips, found.quadrant_flips) == (0, 0)
    assert 0 < found.max_abs_dlogit < 1e-4  # numpy in float64 against onnxruntime in float32
    assert found.worst_frame in golden_of(tiny_bundle).names
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


@pytest.mark.parametrize("classes", [("A", "B", "C"), ("A", "B", "C", "D", "E")])
@pytest.mark.parametrize("vote", ["majority", "average", "weighted"])
def test_other_contracts_pass(tmp_path: Path, make_tiny_bundle: Make, classes: tuple[str, ...], vote: str) -> None:
    folder = make_tiny_bundle(tmp_path, classes=classes, vote=vote, keep=0.8, mean=0.3, std=0.2, temperature=1.7)
    assert verify(folder, device="cpu").passed


@pytest.mark.parametrize("frame", [0, 5])
@pytest.mark.parametrize(
    ("field", "delta"), [("logits", 2e-4), ("probabilities", 2e-4), ("logits", np.nan), ("probabilities", np.nan)]
)
def test_wrong_golden_answer_fails(
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


def test_wrong_graph_fails(tmp_path: Path, make_tiny_bundle: Make) -> None:
    found = verify(make_tiny_bundle(tmp_path, graph={"logit_scale": 1.01}), device="cpu")
    assert not found.passed
    assert found.max_abs_dlogit > 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "bounds", [{}, LOOSE, {**LOOSE, "max_abs_dprobability": 1e300, "max_frame_flip_fraction": 1.0}]
)
def test_nan_never_passes(tmp_path: Path, make_tiny_bundle: Make, value: float, bounds: dict[str, float]) -> None:
    changes = {"manifest": {"parity": gate(**bounds)}} if bounds else {}
    folder = make_tiny_bundle(tmp_path, graph={"logit_scale": value}, **changes)
    assert verify(folder, device="cpu").passed is False


def test_nan_golden_answers_fail_without_logit_bound(tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make) -> None:
    golden = golden_of(tiny_bundle)
    nan = dataclasses.replace(golden, logits=np.full_like(golden.logits, np.nan))
    folder = make_tiny_bundle(tmp_path, golden=nan, manifest={"parity": gate(**LOOSE)})
    assert verify(folder, device="cpu").passed is False


def test_flips_are_counted_and_fail(tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make) -> None:
    golden = golden_of(tiny_bundle)
    swapped = dataclasses.replace(golden, probabilities=golden.probabilities[:, :, ::-1])
    found = verify(make_tiny_bundle(tmp_path, golden=swapped, manifest={"parity": gate(**LOOSE)}), device="cpu")
    assert not found.passed
    assert found.frame_flips > found.frames / 2
    assert found.quadrant_flips > 2 * found.frames
    assert found.frame_flips + found.tolerated_frame_flips <= found.frames
    assert found.quadrant_flips + found.tolerated_quadrant_flips <= 4 * found.frames


# Frames with small decision margins


@pytest.fixture
def undecided(tmp_path: Path, make_tiny_bundle: Make) -> Callable[[float], Path]:
    """Return a factory of bundles with probabilities near 0.5 and golden answers on the other side of it."""
    golden = golden_of(make_tiny_bundle(tmp_path / "plain", temperature=100.0))
    swapped = dataclasses.replace(golden, probabilities=golden.probabilities[:, :, ::-1])

    def make(allowed: float) -> Path:
        bounds = {"max_abs_dprobability": allowed, "max_frame_flip_fraction": 0.0}
        folder = tmp_path / f"{allowed}"
        return make_tiny_bundle(folder, temperature=100.0, golden=swapped, manifest={"parity": gate(**bounds)})

    return make


def test_flips_within_tolerance_are_reported_separately(
    undecided: Callable[[float], Path],
) -> None:
    found = verify(undecided(0.2), device="cpu")
    assert 0.01 < found.max_abs_dprobability < 0.2
    assert found.passed
    assert (found.frame_flips, found.tolerated_frame_flips) == (0, found.frames)
    assert (found.quadrant_flips, found.tolerated_quadrant_flips) == (0, 4 * found.frames)
    assert all(check.tolerated and check.expected != check.found for check in found.golden)


def test_flips_beyond_the_gate_count(undecided: Callable[[float], Path]) -> None:
    folder = undecided(0.004)
    found = verify(folder, device="cpu")
    assert not found.passed
    golden = golden_of(folder)
    leads = frame_margins(golden.probabilities, "majority").max(axis=1)
    assert 0 < (leads > 0.008).sum() < found.frames  # margins on both sides of the bound
    assert found.frame_flips == (leads > 0.008).sum()
    assert found.tolerated_frame_flips == found.frames - found.frame_flips
    assert [check.tolerated for check in found.golden] == (leads <= 0.008).tolist()


def test_difference_beyond_the_gate_fails_without_a_flip(
    tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make
) -> None:
    golden = golden_of(tiny_bundle)
    p = np.array([[[0.5, 0.5]] * 4] * len(golden.names), np.float32)
    bounds = {"max_abs_dprobability": 0.3, "max_frame_flip_fraction": 1.0}
    changed = dataclasses.replace(golden, probabilities=p)
    found = verify(make_tiny_bundle(tmp_path, golden=changed, manifest={"parity": gate(**bounds)}), device="cpu")
    assert (found.frame_flips, found.quadrant_flips) == (0, 0)
    assert found.max_abs_dprobability > 0.3
    assert not found.passed


def test_each_golden_frame_has_a_result(tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make) -> None:
    golden = golden_of(tiny_bundle)
    reasons = tuple((f"reason {index}", "another") for index in range(len(golden.names)))
    found = verify(make_tiny_bundle(tmp_path, golden=dataclasses.replace(golden, reasons=reasons)), device="cpu")
    assert tuple(check.name for check in found.golden) == golden.names
    assert tuple(check.reasons for check in found.golden) == reasons
    assert max(check.max_abs_dlogit for check in found.golden) == found.max_abs_dlogit
    worst = max(found.golden, key=lambda check: check.max_abs_dprobability)
    assert (worst.name, worst.max_abs_dprobability) == (found.worst_frame, found.max_abs_dprobability)
    assert all(check.expected == check.found and check.tolerated for check in found.golden)
    assert found.provider == "CPUExecutionProvider"


def test_low_precision_graph_is_compared_with_its_exported_answers(
    tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make
) -> None:
    right = golden_of(tiny_bundle)
    wrong = (right.logits[..., ::-1].copy(), right.probabilities[..., ::-1].copy())
    both = ("fp32", "int8")
    for name, golden, passes in (
        (
            "far from torch",
            GoldenFrames(right.names, right.frames, *wrong, exported={"int8": right.expected("fp32")}),
            "int8",
        ),
        ("another device", dataclasses.replace(right, exported={"int8": wrong}), "fp32"),
    ):
        folder = make_tiny_bundle(tmp_path / name, precisions=both, golden=golden)
        found = {precision: verify(folder, device="cpu", precision=precision).passed for precision in both}
        assert found == {precision: precision == passes for precision in both}


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


def test_requested_precision_is_verified(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path, precisions=("fp32", "int8"))
    assert verify(folder, device="cpu", precision="int8", threads=1).precision == "int8"


def test_missing_bundle_and_missing_gate_raise(tmp_path: Path, make_tiny_bundle: Make) -> None:
    with pytest.raises(BundleNotFoundError):
        verify(tmp_path)
    with pytest.raises(BundleError, match="no parity gate"):
        verify(make_tiny_bundle(tmp_path, manifest={"parity": {}}), device="cpu")


# Reports over several devices and precisions


def test_report_of_all_devices(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle", precisions=("fp32", "int8"))
    steps: list[tuple[int, int]] = []
    record = verify_all(
        folder, devices={"cpu": None, "cuda": "no driver"}, threads=1, progress=lambda *step: steps.append(step)
    )
    assert record.passed and record.error is None
    assert [(check.device, check.precision) for check in record.checks] == [("cpu", "fp32"), ("cpu", "int8")]
    assert steps == [(0, 2), (1, 2)]
    assert record.unavailable_devices == {"cuda": "no driver"}
    manifest = json.loads((folder / "bundle.json").read_text("ascii"))
    found = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    assert (found["verdict"], found["error"], found["bundle"]) == ("passed", None, folder.as_posix())
    assert found["manifest_sha256"] == manifest["manifest_sha256"]
    assert found["contract_sha256"] == manifest["contract_sha256"]
    assert (found["files"], found["signed_by"]) == (4, None)
    assert datetime.fromisoformat(found["created"]).utcoffset() == timedelta(0)
    assert {"echoquad", "onnxruntime", "python", "platform", "CPU"} <= found["versions"].keys()
    assert found["devices_not_usable"] == {"cuda": "no driver"}
    for check, precision in zip(found["checks"], ("fp32", "int8"), strict=True):
        assert (check["device"], check["provider"], check["precision"]) == ("cpu", "CPUExecutionProvider", precision)
        assert check["passed"] is True and check["gate"] == manifest["parity"][precision]["gate"]
        assert [frame["name"] for frame in check["golden"]] == list(golden_of(folder).names)


def test_report_has_failed_check_beside_passed_ones(
    tmp_path: Path, make_tiny_bundle: Make, make_tiny_graph: Callable[..., bytes]
) -> None:
    contract = Bundle(make_tiny_bundle(tmp_path / "plain")).contract
    wrong = make_tiny_graph(contract, logit_scale=float("nan"))
    folder = make_tiny_bundle(tmp_path / "bundle", precisions=("fp32", "int8"), graphs={"int8": wrong})
    record = verify_all(folder, devices={"cpu": None})
    assert [check.passed for check in record.checks] == [True, False]
    assert not record.passed and record.error is None
    found = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    assert found["verdict"] == "failed"
    assert found["checks"][1]["max_abs_dlogit"] is None  # not a number
    assert found["checks"][1]["golden"][0]["max_abs_dprobability"] is None


def test_graph_that_cannot_run_does_not_stop_other_checks(
    tmp_path: Path, make_tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_slot = OnnxEngine.open_slot

    def breaks(engine: OnnxEngine, frames: int) -> Any:
        if engine.precision == "int8" and frames > 1:
            raise BundleError("the int8 graph fails on cpu: out of memory")
        return open_slot(engine, frames)

    monkeypatch.setattr(OnnxEngine, "open_slot", breaks)
    folder = make_tiny_bundle(tmp_path / "bundle", precisions=("int8", "fp32"))
    record = verify_all(folder, devices={"cpu": None})
    assert {check.precision: check.passed for check in record.checks} == {"fp32": True, "int8": False}
    assert [str(check.error) for check in record.checks if check.error] == [
        "the int8 graph fails on cpu: out of memory"
    ]
    assert not record.passed


def test_unavailable_device_fails_only_if_it_is_the_only_one(
    tmp_path: Path, make_tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: bytes, *, device: str, **options: Any) -> Any:
        if device == "openvino":
            raise DeviceUnavailableError("device openvino cannot be used: it is not there")
        return open_session(model, device=device, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("echoquad_runtime.engine.onnx_engine.open_session", refuse)
    folder = make_tiny_bundle(tmp_path / "bundle")
    both = verify_all(folder, devices={"cpu": None, "openvino": None})
    assert [(check.device, check.precision, check.usable) for check in both.checks] == [
        ("cpu", "fp32", True),
        ("openvino", "fp32", False),
        ("openvino", "bf16", False),
    ]
    assert both.passed
    refused = both.to_dict()["checks"][1]
    assert (refused["passed"], refused["usable"]) == (False, False)
    assert refused["error"] == "device openvino cannot be used: it is not there"
    assert not verify_all(folder, devices={"openvino": None}).passed
    assert not verify_all(folder, devices={"openvino": "not there"}).passed


def test_damaged_bundle_has_a_report(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle")
    (folder / "MODEL_CARD.md").write_text("another")
    record = verify_all(folder, devices={"cpu": None})
    assert isinstance(record.error, BundleTamperedError) and not record.passed
    found = record.to_dict()
    assert (found["verdict"], found["files"], found["checks"]) == ("failed", 0, [])
    assert "MODEL_CARD.md" in found["error"] and found["manifest_sha256"] is not None
    nothing = verify_all(tmp_path / "none", devices={"cpu": None}).to_dict()
    assert (nothing["verdict"], nothing["manifest_sha256"]) == ("failed", None)
    assert "no bundle here" in nothing["error"]
    lacking = verify_all(make_tiny_bundle(tmp_path / "fp32"), devices={"cpu": None}, precisions=["int8"])
    assert "it holds no int8 graph" in str(lacking.error)


def test_batch_size_does_not_depend_on_number_of_golden_frames(
    tmp_path: Path, tiny_bundle: Path, make_tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak memory must not depend on the number of golden frames."""
    golden = golden_of(tiny_bundle)
    many = GoldenFrames(
        golden.names * 7,
        golden.frames * 7,
        np.tile(golden.logits, (7, 1, 1)),
        np.tile(golden.probabilities, (7, 1, 1)),
    )
    sizes: list[int] = []
    run = IoBinding.run

    def watch(slot: IoBinding, batch: np.ndarray, frames: int) -> Any:
        assert len(batch) <= 2  # the batch size of `predict` on the CPU
        sizes.append(frames)
        return run(slot, batch, frames)

    monkeypatch.setattr(IoBinding, "run", watch)
    found = verify(make_tiny_bundle(tmp_path, golden=many), device="cpu")
    assert found.passed and found.frames == 42
    assert Counter(sizes) == {1: 42 + 42, 2: 21}  # one at a time and bucket 1; bucket 2
