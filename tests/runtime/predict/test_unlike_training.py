"""Tests of frames unlike the training frames: column, flag, abstention, resume, verification, and older bundles."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.golden_frames import decode_golden, encode_golden
from echoquad_runtime.contract import INDETERMINATE, Contract
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import run_in_batches
from echoquad_runtime.errors import BundleError, ConfigError, ResultError, VerificationError
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.predict.prediction import Prediction, decide
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.results.result_file import ResultFile, read_run_record
from echoquad_runtime.results.row_formats import open_writer
from echoquad_runtime.results.shards import Shard, merge
from echoquad_runtime.verify.verify import verify

CLASSES = ("ASD", "NORM")


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_quadrants_are_scored_at_their_own_position(scored: Any, batch_size: int) -> None:
    engine = OnnxEngine(Bundle(scored.bundle), device="cpu", cam=True)
    output = run_in_batches(engine, scored.quadrants, batch_size)
    assert output.typicality is not None and output.typicality.dtype == np.float32
    np.testing.assert_allclose(output.typicality, scored.scores, rtol=1e-4)


def test_predictions_have_typicality_and_flag(scored: Any) -> None:
    found = list(Predictor(scored.bundle, device="cpu").predict_frames(scored.frames))
    for one, expected in zip(found, 1 / (1 / scored.scores).mean(axis=1), strict=True):
        assert isinstance(one, Prediction) and one.typicality == pytest.approx(expected, rel=1e-4)
        assert ("unlike-training" in one.flags) == (one.typicality < scored.threshold)
        assert one.label != INDETERMINATE
    assert sum("unlike-training" in one.flags for one in found if isinstance(one, Prediction)) == 5
    assert Predictor(scored.bundle, device="cpu")(scored.frames[3], "3") == found[3]


def test_abstain_unlike_makes_flagged_frames_indeterminate(scored: Any) -> None:
    plain = list(Predictor(scored.bundle, device="cpu").predict_frames(scored.frames))
    found = list(Predictor(scored.bundle, device="cpu", abstain_unlike=True).predict_frames(scored.frames))
    for before, one in zip(plain, found, strict=True):
        assert isinstance(before, Prediction) and isinstance(one, Prediction)
        assert (one.label == INDETERMINATE) == ("unlike-training" in one.flags)
        assert (one.predicted_class, one.flags, one.typicality) == (before.label, before.flags, before.typicality)


def test_bundle_without_score_has_no_typicality_and_cannot_abstain(tiny_bundle: Path, make_frame: Any) -> None:
    one = Predictor(tiny_bundle, device="cpu")(make_frame(0))
    assert one.typicality is None and "unlike-training" not in one.flags
    with pytest.raises(ConfigError, match="typicality score"):
        Predictor(tiny_bundle, device="cpu", abstain_unlike=True)


def test_typicality_that_is_not_a_number_is_a_failure(tiny_bundle: Path) -> None:
    output = run_in_batches(OnnxEngine(Bundle(tiny_bundle), device="cpu"), np.zeros((2, 4, 32, 32), np.uint8), 1)
    output = output._replace(typicality=np.array([[1, 1, 1, 1], [1, 1, np.nan, 1]], np.float32))
    one, other = decide(
        ["a", "b"],
        [(), ()],
        output,
        Contract(CLASSES, input_size=32),
        method="majority",
        device="cpu",
        precision="fp32",
        threshold=0.5,
    )
    assert isinstance(one, Prediction) and one.typicality == 1.0
    assert isinstance(other, Failure) and "not a number" in str(other.error)


# Rows


def prediction(name: str, typicality: float | None = 0.12345) -> Prediction:
    row = (0.7, 0.3)
    return Prediction(
        name, CLASSES, "majority", "ASD", row, ("ASD",) * 4, (row,) * 4, (), "cpu", "fp32", typicality=typicality
    )


@pytest.mark.parametrize(("typicality", "cell", "value"), [(0.12345, "0.1235", 0.12345), (None, "", None)])
def test_last_column_is_the_typicality(
    typicality: float | None, cell: str, value: float | None, tmp_path: Path
) -> None:
    for ending in ("csv", "jsonl"):
        with open_writer(tmp_path / f"rows.{ending}", CLASSES) as writer:
            writer.write(prediction("a.png", typicality))
    with (tmp_path / "rows.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert list(row)[-1] == "typicality" and row["typicality"] == cell
    assert json.loads((tmp_path / "rows.jsonl").read_text())["typicality"] == value


def identity(shard: str | None = None, **more: str) -> dict[str, Any]:
    ran = {"bundle": "b" * 64, "method": "majority", "device": "cpu", "precision": "fp32", "shard": shard}
    return {**ran, "abstain_below": None, **more}


def write_rows(path: Path, named: dict[str, Any], *names: str, resume: bool = False) -> None:
    with ResultFile(path, resume=resume) as rows:
        rows.begin(CLASSES, named)
        for name in names:
            rows.write(prediction(name))
        rows.finish()


def test_resume_and_merge_refuse_rows_of_the_other_choice(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, identity(abstain_unlike="yes"), "a.png")
    assert (read_run_record(path) or {})["abstain_unlike"] == "yes"
    with pytest.raises(ResultError, match="abstain_unlike is yes, this run's is none"):
        write_rows(path, identity(), "b.png", resume=True)
    write_rows(path, identity(abstain_unlike="yes"), "b.png", resume=True)
    parts = []
    for index, more in ((1, {"abstain_unlike": "yes"}), (2, {})):
        name = next(f"{n}.png" for n in range(99) if Shard(index, 2).holds(f"{n}.png"))
        write_rows(tmp_path / f"{index}.csv", identity(f"{index}/2", **more), name)
        parts.append(tmp_path / f"{index}.csv")
    with pytest.raises(ResultError, match="abstain_unlike"):
        merge(parts, tmp_path / "all.csv")


def without_typicality(path: Path) -> None:
    """Turn a finished result file into one of an earlier release."""
    import hashlib

    if path.suffix == ".csv":
        data = b"".join(line.rpartition(b",")[0] + b"\n" for line in path.read_bytes().splitlines())
    else:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        data = b"".join(json.dumps({k: row[k] for k in list(row)[:-1]}).encode() + b"\n" for row in rows)
    path.write_bytes(data)
    record = path.with_name(f"{path.name}.run.json")
    content = {**json.loads(record.read_text()), "sha256": hashlib.sha256(data).hexdigest()}
    record.write_text(json.dumps(content))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_files_of_earlier_releases_are_merged_as_they_are_and_not_resumed(ending: str, tmp_path: Path) -> None:
    parts = []
    for index in (1, 2):
        path = tmp_path / f"{index}.{ending}"
        names = [f"{n}.png" for n in range(20) if Shard(index, 2).holds(f"{n}.png")]
        write_rows(path, identity(f"{index}/2"), *names)
        without_typicality(path)
        parts.append(path)
    assert merge(parts, tmp_path / f"all.{ending}").rows == 20
    assert b"typicality" not in (tmp_path / f"all.{ending}").read_bytes()
    with pytest.raises(ResultError, match="columns"):
        write_rows(parts[0], identity("1/2"), "b.png", resume=True)
    write_rows(tmp_path / f"2.{ending}", identity("2/2"), *names)  # of this release
    with pytest.raises(ResultError, match="columns"):
        merge(parts, tmp_path / f"all.{ending}")


# Verification


def test_verify_and_self_test_measure_the_typicality(scored: Any, tmp_path: Path, make_tiny_bundle: Any) -> None:
    found = verify(scored.bundle, device="cpu")
    assert found.passed and found.max_rel_dtypicality is not None and found.max_rel_dtypicality < 1e-3
    golden = replace(scored.golden, typicality=scored.golden.typicality * np.float32(1.01))
    wrong = make_tiny_bundle(tmp_path / "wrong", graph={"typicality": True}, golden=golden, manifest=scored.manifest)
    found = verify(wrong, device="cpu")
    assert not found.passed and found.max_rel_dtypicality == pytest.approx(0.01, rel=0.05)
    lost = make_tiny_bundle(tmp_path / "lost", golden=scored.golden, manifest=scored.manifest)
    assert not verify(lost, device="cpu").passed  # the graph lacks the score
    for folder in (wrong, lost):
        with pytest.raises(VerificationError, match="typicality"):
            Predictor(folder, device="cpu")(scored.frames[0])


def test_bundle_without_score_is_verified_as_before(tiny_bundle: Path) -> None:
    found = verify(tiny_bundle, device="cpu")
    assert found.passed and found.max_rel_dtypicality is None


def test_golden_frames_keep_the_typicality_of_each_precision(scored: Any) -> None:
    expected = scored.golden.typicality
    int8 = expected * np.float32(0.9)
    golden = replace(
        scored.golden, exported={"int8": scored.golden.expected("fp32")}, exported_typicality={"int8": int8}
    )
    found = decode_golden(encode_golden(golden), 2, "bundle")
    for precision, scores in (("fp32", expected), ("int8", int8), ("fp16", expected)):
        np.testing.assert_array_equal(found.expected_typicality(precision), scores)
    plain = decode_golden(encode_golden(replace(scored.golden, typicality=None)), 2, "bundle")
    assert plain.expected_typicality("fp32") is None
    for wrong in (expected[:, :3], expected.astype(np.float64)):
        with pytest.raises(BundleError, match="typicality"):
            decode_golden(encode_golden(replace(golden, typicality=wrong)), 2, "bundle")
