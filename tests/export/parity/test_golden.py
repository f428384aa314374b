"""Golden frames: coverage, size limits, determinism, sources and privacy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_export.graph.typicality import ReferenceEngine, fit_typicality
from echoquad_export.packing import exporter as pack
from echoquad_export.packing.exporter import REFERENCE_BATCH, export_run
from echoquad_export.parity import golden as module
from echoquad_export.parity.golden import (
    MAX_BYTES,
    MAX_FRAMES,
    PHANTOM,
    GoldenSource,
    fixed_frames,
    golden_facts,
    golden_source,
    make_golden,
    pack_golden,
)
from echoquad_export.precision.calibration_set import draw_calibration_set
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.golden_frames import GoldenFrames, encode_golden
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import InputNotFoundError
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.quadrants import Grey, frame_quadrants, quadrant_boxes
from echoquad_runtime.verify.decision_margins import frame_margins, quadrant_margins
from echoquad_runtime.voting import aggregate_votes
from echoquad_train.runs.checkpoint import load_run

TWO = Contract(classes=("ASD", "NORM"), input_size=16)


@pytest.fixture(scope="module", autouse=True)
def _drawn_once() -> Iterator[None]:
    drawn = list(module._phantoms())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_phantoms", lambda: iter(drawn))
        yield


class Brightness:
    """A stand-in for the training code: classifies by mean and deviation of the grey levels, and counts frames."""

    device, precision, note = "cpu", "fp32", ""

    def __init__(self, contract: Contract) -> None:
        self.contract, self.inferences = contract, 0
        count = len(contract.classes)
        rng = np.random.default_rng(count)
        self._matrix = rng.normal(0, 6, (2, count))
        self._bias = np.zeros(count)
        sample = np.concatenate([frame_quadrants(frame, contract) for _, frame in list(module._phantoms())[8:40]])
        self._bias = -np.median(self._logits(sample), axis=0)

    def _logits(self, quadrants: np.ndarray) -> np.ndarray:
        features = np.stack([quadrants.mean((1, 2, 3)), quadrants.std((1, 2, 3))], axis=1) / 64
        return features @ self._matrix + self._bias

    def infer(self, quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.inferences += 1
        logits = self._logits(quadrants)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        return logits.astype(np.float32), probabilities.astype(np.float32)


class Constant(Brightness):
    """A model with constant output."""

    def _logits(self, quadrants: np.ndarray) -> np.ndarray:
        return np.tile(np.arange(len(self.contract.classes), dtype=float), (len(quadrants), 1))


def patterns(golden: GoldenFrames) -> set[tuple[int, ...]]:
    return set(map(tuple, golden.probabilities.argmax(axis=2).tolist()))


def reason_of(golden: GoldenFrames, text: str) -> list[str]:
    """Return the frames that have a reason with this prefix."""
    pairs = zip(golden.names, golden.reasons, strict=True)
    return [name for name, reasons in pairs if any(reason.startswith(text) for reason in reasons)]


CONTRACTS = {
    "majority": TWO,
    "average": Contract(classes=("ASD", "NORM"), input_size=16, vote="average", keep=1.0),
    "three classes, weighted": Contract(classes=("A", "B", "C"), input_size=24, vote="weighted", keep=0.7),
    "five classes": Contract(classes=("A", "B", "C", "D", "E"), input_size=16),
    "nine classes": Contract(classes=tuple("ABCDEFGHI"), input_size=16),
}


@pytest.fixture(scope="module", params=CONTRACTS.values(), ids=CONTRACTS)
def made(request: pytest.FixtureRequest) -> tuple[Brightness, GoldenFrames]:
    engine = Brightness(request.param)
    return engine, make_golden(engine)


# What is in it


def test_golden_file_and_pool_stay_within_limits(made: tuple[Brightness, GoldenFrames]) -> None:
    engine, golden = made
    assert len(fixed_frames(engine.contract)) < len(golden.names) <= MAX_FRAMES
    assert len(set(golden.names)) == len(golden.names) == len(golden.reasons)
    assert len(encode_golden(golden)) <= MAX_BYTES <= 500_000
    assert engine.inferences <= 200


def test_golden_answers_are_those_of_the_training_code(made: tuple[Brightness, GoldenFrames]) -> None:
    engine, golden = made
    for frame, logits, probabilities in zip(golden.frames, golden.logits, golden.probabilities, strict=True):
        expected = engine.infer(frame_quadrants(frame, engine.contract))
        np.testing.assert_array_equal(logits, expected[0])
        np.testing.assert_array_equal(probabilities, expected[1])


def test_fixed_frames_and_shapes_are_included(made: tuple[Brightness, GoldenFrames]) -> None:
    engine, golden = made
    size = engine.contract.input_size
    frames = dict(zip(golden.names, golden.frames, strict=True))
    assert frames["blank"].max() == 0 and frames["saturated"].min() == 255
    assert frames["smallest"].shape == (2, 2) and len(np.unique(frames["ramp"])) > 250
    for name in ("stripes", "stripes-upright"):
        left, top, right, bottom = quadrant_boxes(*frames[name].shape[::-1], engine.contract.keep)[0]
        assert min(right - left, bottom - top) > size  # reduced, not enlarged
        assert (right - left > bottom - top) == (name == "stripes")
    sides = np.array([frame.shape for frame in golden.frames])
    assert {tuple(row) for row in sides % 2} >= {(0, 0), (0, 1), (1, 1)}
    assert (sides[:, 0] > sides[:, 1]).any() and (sides[:, 0] < sides[:, 1]).any()
    assert all(reasons for reasons in golden.reasons)


def test_golden_frames_cover_classes_votes_and_ties_of_the_pool(made: tuple[Brightness, GoldenFrames]) -> None:
    engine, golden = made
    contract = engine.contract
    pool = np.stack([engine.infer(frame_quadrants(frame, contract))[1] for _, frame in module._phantoms()])
    found = aggregate_votes(golden.probabilities, contract.vote, contract.vote_weights)
    there = aggregate_votes(pool, contract.vote, contract.vote_weights)
    assert set(found.labels) >= set(there.labels)
    assert all(reason_of(golden, f"decided {contract.classes[label]}") for label in set(there.labels))
    for quadrant in range(4):
        assert set(found.quadrant_labels[:, quadrant]) >= set(there.quadrant_labels[:, quadrant])
    if (aggregate_votes(pool, "majority").margins == 0).any():
        assert (aggregate_votes(golden.probabilities, "majority").margins == 0).any()
        assert reason_of(golden, "tie of votes decided ")
    if len(contract.classes) == 2:
        assert patterns(golden) >= set(map(tuple, there.quadrant_labels.tolist()))


def test_golden_frames_include_the_smallest_margins_of_the_pool(made: tuple[Brightness, GoldenFrames]) -> None:
    engine, golden = made
    contract = engine.contract
    names, frames = zip(*module._phantoms(), strict=True)
    p = np.stack([engine.infer(frame_quadrants(frame, contract))[1] for frame in frames])
    margins = np.partition(frame_margins(p, contract.vote, contract.vote_weights), 1, axis=1)[:, 1]
    leads = np.partition(quadrant_margins(p), 1, axis=2)[..., 1].min(axis=1)
    # A stitched frame can have a smaller margin and replace it.
    for values, what in ((margins, "frame margin"), (leads, "quadrant margin")):
        names_with_reason = reason_of(golden, what)
        assert len(names_with_reason) == 4
        assert names[values.argmin()] in names_with_reason or any("stitched" in name for name in names_with_reason)
    facts = golden_facts(golden, contract, PHANTOM, 1)
    assert facts["smallest_margin"] <= margins.min() and facts["smallest_quadrant_margin"] <= leads.min()


@pytest.mark.parametrize(
    "contract",
    [CONTRACTS["majority"], CONTRACTS["average"], replace(CONTRACTS["majority"], quadrants=("RV", "LV", "RA", "LA"))],
    ids=["crop", "no crop", "apex-up"],
)
def test_missing_vote_patterns_are_stitched(contract: Contract) -> None:
    golden = make_golden(Brightness(contract))
    assert len(patterns(golden)) == 16
    votes = golden.probabilities.argmax(axis=2)
    stitched = {name: row for name, row in zip(golden.names, votes.tolist(), strict=True) if "stitched" in name}
    assert stitched  # otherwise the test proves nothing
    for name, row in stitched.items():
        assert name == f"phantom-stitched-{''.join(map(str, row))}"


def test_constant_model_gets_few_golden_frames() -> None:
    engine = Constant(TWO)
    golden = make_golden(engine)
    facts = golden_facts(golden, TWO, PHANTOM, 1)
    assert facts["classes"] == {"ASD": 0, "NORM": len(golden.names)}
    assert (facts["patterns_found"], facts["ties"]) == (1, 0)
    assert len(golden.names) < 20


def test_golden_file_is_deterministic(case: Any, thin: None) -> None:
    run = load_run(case.run)
    engine = ReferenceEngine(run.model, run.contract)
    fit_typicality(engine, draw_calibration_set(case.data, run.contract).quadrants, REFERENCE_BATCH)
    data, facts = pack_golden(engine, PHANTOM)
    assert data == (case.bundle / "golden.npz").read_bytes()
    manifest = Bundle(case.bundle).manifest
    assert manifest["golden"] == facts
    assert facts["bytes"] == len(data) == manifest["files"]["golden.npz"]["bytes"]


def test_answers_of_reduced_precision_graphs_are_stored(tmp_path: Path, make_tiny_bundle: Any) -> None:
    class Coarse(Brightness):
        precision = "int8"

        def infer(self, quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logits, probabilities = super().infer(quadrants)
            return logits.round(1), probabilities.round(2)

    contract = replace(TWO, input_size=32)
    data, facts = pack_golden(Brightness(contract), PHANTOM, [Coarse(contract)])
    bundle = Bundle(make_tiny_bundle(tmp_path, contract=contract, golden=data))
    golden = bundle.read_golden()
    plain, _ = pack_golden(Brightness(contract), PHANTOM)
    assert (
        golden.names
        == Bundle(make_tiny_bundle(tmp_path / "plain", contract=contract, golden=plain)).read_golden().names
    )
    np.testing.assert_array_equal(golden.expected("int8")[0], golden.logits.round(1))
    np.testing.assert_array_equal(golden.expected("int8")[1], golden.probabilities.round(2))
    for precision in ("fp32", "fp16", "bf16"):
        assert golden.expected(precision)[0] is golden.logits
    assert facts["bytes"] == len(data) > len(plain)


def test_golden_facts_on_a_hand_computed_case() -> None:
    # Of the first of two classes: a clear frame, a tie, three to one with one vote near the edge.
    first = np.array([[0.9, 0.8, 0.9, 0.8], [0.9, 0.8, 0.3, 0.2], [0.1, 0.45, 0.2, 0.9]], np.float32)
    p = np.stack([first, 1 - first], axis=2)
    frames = tuple(np.zeros((4, 4), np.uint8) for _ in first)
    golden = GoldenFrames(("a", "b", "c"), frames, p, p, ((),) * 3)
    facts = golden_facts(golden, TWO, PHANTOM, 1234)
    assert {key: facts[key] for key in ("source", "frames", "bytes", "classes")} == {
        "source": "phantom",
        "frames": 3,
        "bytes": 1234,
        "classes": {"ASD": 2, "NORM": 1},
    }
    assert (facts["patterns_found"], facts["patterns_possible"], facts["ties"]) == (3, 16, 1)
    # The tie hangs on the means, 0.55 against 0.45; the third frame on one vote, then on 0.4125 against 0.5875.
    assert facts["smallest_margin"] == pytest.approx(0.1)
    assert facts["smallest_quadrant_margin"] == pytest.approx(0.1)


# Files


def write(folder: Path, count: int, make: Callable[[int], Grey]) -> list[FrameFile]:
    folder.mkdir(parents=True)
    found = []
    for index in range(count):
        path = folder / f"DOE-JANE-{index}.png"
        Image.fromarray(make(index)).save(path)
        found.append(FrameFile(path, path.name))
    return found


def noise(height: int, width: int) -> Callable[[int], Grey]:
    def make(seed: int) -> Grey:
        rng = np.random.default_rng(seed)
        return np.clip(rng.normal(rng.uniform(40, 200), 30, (height, width)), 0, 255).astype(np.uint8)

    return make


def test_golden_source_accepts_phantom_validation_and_folder(tmp_path: Path) -> None:
    files = write(tmp_path / "frames", 3, noise(40, 40))
    assert golden_source("phantom", files) == PHANTOM
    assert golden_source("validation", files) == GoldenSource("validation", tuple(files))
    found = golden_source(str(tmp_path), [])
    assert (found.name, [file.path for file in found.files]) == ("folder", [file.path for file in files])
    (tmp_path / "empty").mkdir()
    for wanted, words in (("nowhere", "no such file or folder"), ("empty", "the folder holds no image")):
        with pytest.raises(
            InputNotFoundError, match=rf"^--golden .*{wanted}: {words}.*; or name phantom or validation$"
        ):
            golden_source(str(tmp_path / wanted), [])


@pytest.mark.parametrize("name", ["validation", "folder"])
def test_golden_file_contains_no_file_names(tmp_path: Path, name: str) -> None:
    files = write(tmp_path / "scans of DOE-JANE", 12, noise(50, 61))
    (files[3].path).write_bytes(b"no image")
    source = GoldenSource(name, tuple(files))
    data, facts = pack_golden(Brightness(TWO), source)
    golden = make_golden(Brightness(TWO), source)
    assert b"DOE" not in data and "DOE" not in str(facts) and "DOE" not in str(golden.reasons)
    fixed = set(fixed_frames(TWO))
    taken = [frame for frame in golden.names if frame not in fixed]
    assert taken and set(taken) <= {f"{name}-{index:03d}" for index in range(12) if index != 3}
    assert facts["source"] == name
    assert not any("phantom" in frame for frame in golden.names)


def test_unreadable_and_huge_files_raise_input_not_found(tmp_path: Path) -> None:
    files = write(tmp_path / "a", 2, noise(40, 40))
    for file in files:
        file.path.write_bytes(b"")
    vast = write(tmp_path / "b", 1, lambda _: np.zeros((1500, 1500), np.uint8))
    with pytest.raises(InputNotFoundError, match="none of the 3 files of the folder can be read"):
        make_golden(Brightness(TWO), GoldenSource("folder", (*files, *vast)))


def test_large_frames_do_not_exceed_the_size_limit(tmp_path: Path) -> None:
    """Where not all can have a place, decisions come first, and small frames before large ones."""
    large = write(tmp_path / "large", 20, noise(420, 400))
    small = write(tmp_path / "small", 3, noise(60, 50))
    engine = Brightness(TWO)
    data, facts = pack_golden(engine, GoldenSource("folder", (*large, *small)))
    golden = make_golden(engine, GoldenSource("folder", (*large, *small)))
    assert len(data) <= MAX_BYTES and 1 < len(reason_of(golden, "")) < 16
    pool = [frame for frame in golden.frames if frame.shape == (420, 400)]
    assert 0 < len(pool) < 8
    assert min(facts["classes"].values()) > 0


def test_pool_is_spread_evenly_over_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POOL", 10)
    files = write(tmp_path / "frames", 40, noise(20, 20))
    engine = Brightness(TWO)
    golden = make_golden(engine, GoldenSource("validation", tuple(files)))
    assert engine.inferences == 10 + len(fixed_frames(TWO))
    indices = [int(name[-3:]) for name in golden.names if name.startswith("validation")]
    assert indices and all(index % 4 == 0 for index in indices)


def test_export_with_golden_frames_from_a_folder(
    case: Any, thin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = (case.bundle / "model.fp32.onnx").read_bytes()
    monkeypatch.setattr(pack, "build_graph", lambda *_: graph)  # building takes seconds
    golden = str(case.data / "validation" / "ASD")
    export_run(case.run, tmp_path / "bundle", golden=golden)
    bundle = Bundle(tmp_path / "bundle")
    assert bundle.manifest["golden"]["source"] == "folder"
    assert "this bundle may hold patients' pixels" in " ".join(
        (tmp_path / "bundle" / "MODEL_CARD.md").read_text("utf-8").split()
    )
    everything = b"".join(path.read_bytes() for path in (tmp_path / "bundle").iterdir())
    assert b"DOE" not in everything and golden.encode() not in everything
    with pytest.raises(InputNotFoundError, match="no such file or folder"):
        export_run(case.run, tmp_path / "other", golden="nowhere")
    assert not (tmp_path / "other").exists()


def test_reasons_survive_encoding(tmp_path: Path, make_tiny_bundle: Callable[..., Path]) -> None:
    frames = (np.zeros((2, 2), np.uint8), np.ones((3, 2), np.uint8))
    p = np.full((2, 4, 2), 0.5, np.float32)
    reasons = (("votes A; B", 'a "quoted" Ω'), ("only one",))
    golden = GoldenFrames(("a", "b"), frames, p, p, reasons)
    found = Bundle(make_tiny_bundle(tmp_path / "with", golden=golden)).read_golden()
    assert found.reasons == reasons
    assert encode_golden(found) == encode_golden(golden)
    without = GoldenFrames(("a", "b"), frames, p, p)
    assert Bundle(make_tiny_bundle(tmp_path / "without", golden=without)).read_golden().reasons == ()
