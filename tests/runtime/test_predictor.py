from __future__ import annotations

import dataclasses
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime import predictor as module
from echoquad_runtime.bundle import Bundle
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import BundleNotFoundError, ConfigError, FrameError, FrameTooSmallError, InputNotFoundError
from echoquad_runtime.inputs import FrameFile
from echoquad_runtime.predictor import DEFAULT_BATCH_SIZE, Failure, Prediction, Predictor
from echoquad_runtime.quadrants import Grey, frame_quadrants
from echoquad_runtime.session import OnnxEngine

Make = Callable[..., Path]
Frame = Callable[..., Grey]


class MeanEngine:
    """Says of a quadrant that it is class 1 with the probability of its mean grey level over 255; counts its calls."""

    device, precision = "cpu", "fp32"

    def __init__(self, **changes: Any) -> None:
        self.contract = Contract(classes=("dark", "light"), keep=1.0, input_size=8, **changes)
        self.calls: list[int] = []

    def infer(self, quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert quadrants.shape[1:] == (1, 8, 8)
        assert quadrants.dtype == np.uint8
        self.calls.append(len(quadrants))
        light = quadrants.mean(axis=(1, 2, 3), dtype=np.float64) / 255
        probabilities = np.stack([1 - light, light], axis=1).astype(np.float32)
        return probabilities, probabilities


def levels(*quadrants: int) -> Grey:
    """Make a frame of four flat quadrants LA RA LV RV."""
    return np.kron(np.array(quadrants, np.uint8).reshape(2, 2), np.ones((8, 8), np.uint8))


def judged(results: Iterator[Prediction | Failure]) -> list[Prediction]:
    found = list(results)
    assert all(isinstance(result, Prediction) for result in found), found
    return found  # type: ignore[return-value]


def numbers(results: Sequence[Prediction]) -> np.ndarray:
    return np.array([result.quadrant_probabilities for result in results])


# ---------------------------------------------------------------------------------------------- one frame


def test_a_prediction(tiny_bundle: Path, make_frame: Frame) -> None:
    predictor, frame = Predictor(tiny_bundle, device="cpu"), make_frame(2)
    found = predictor(frame)
    _, probabilities = predictor.engine.infer(frame_quadrants(frame, predictor.contract))
    np.testing.assert_allclose(found.quadrant_probabilities, probabilities, rtol=0, atol=1e-6)
    assert found.probabilities == pytest.approx(probabilities.mean(axis=0).tolist())
    assert found.quadrant_labels == tuple(("ASD", "NORM")[i] for i in probabilities.argmax(axis=1))
    assert (found.classes, found.method, found.device, found.precision) == (("ASD", "NORM"), "majority", "cpu", "fp32")
    assert all(type(value) is float for value in found.probabilities)
    assert dataclasses.asdict(found)["file"] == "0"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.label = "NORM"  # type: ignore[misc]


def test_what_a_predictor_takes(tiny_bundle: Path, make_frame: Frame) -> None:
    bundle = Bundle(tiny_bundle)
    engine = OnnxEngine(bundle, device="cpu")
    frame = make_frame(0)
    found = {Predictor(model)(frame) for model in (tiny_bundle, str(tiny_bundle), bundle, engine)}
    assert len(found) == 1
    with pytest.raises(BundleNotFoundError):
        Predictor(tiny_bundle / "absent")


def test_quadrants_keep_their_places() -> None:
    found = Predictor(MeanEngine())(levels(0, 51, 102, 255))
    assert [round(row[1], 3) for row in found.quadrant_probabilities] == [0.0, 0.2, 0.4, 1.0]
    assert found.quadrant_labels == ("dark", "dark", "dark", "light")
    assert (found.label, found.flags) == ("dark", ())
    assert found.probabilities[1] == pytest.approx(0.4)


def test_methods() -> None:
    frame = levels(110, 110, 110, 255)  # three votes for dark, but a mean that is light
    engine = MeanEngine(vote_weights=(10.0, 0.0, 0.0, 1.0), vote="average")
    found = {method: Predictor(engine, method=method)(frame) for method in ("majority", "average", "weighted")}
    assert {method: result.label for method, result in found.items()} == {
        "majority": "dark",
        "average": "light",
        "weighted": "dark",
    }
    assert all(result.method == method for method, result in found.items())
    assert len({result.probabilities for result in found.values()}) == 1  # the plain mean, whatever the method
    assert Predictor(engine)(frame) == found["average"]  # the contract's


@pytest.mark.parametrize(
    ("quadrants", "method", "flags"),
    [
        ((0, 0, 255, 255), "majority", ("tie",)),
        ((0, 100, 150, 255), "majority", ("tie",)),
        ((0, 0, 0, 255), "majority", ()),
        ((255,) * 4, "majority", ()),
        ((0, 0, 255, 255), "average", ()),
        ((0, 0, 255, 255), "weighted", ()),
    ],
)
def test_a_tie_is_flagged(quadrants: tuple[int, ...], method: Any, flags: tuple[str, ...]) -> None:
    found = Predictor(MeanEngine(), method=method)(levels(*quadrants))
    assert found.flags == flags
    if flags:
        assert found.label == found.classes[int(np.argmax(found.probabilities))]


@pytest.mark.parametrize("options", [{"method": "plurality"}, {"batch_size": 0}, {"batch_size": -1}])
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="found; expected"):
        Predictor(MeanEngine(), **options)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.zeros((4, 4)), r"float64 \(4, 4\)"),
        (np.zeros((4, 4), np.int8), r"int8 \(4, 4\)"),
        (np.zeros((4, 4), np.uint16), r"uint16 \(4, 4\)"),
        (np.zeros((4, 4, 3), np.uint8), r"uint8 \(4, 4, 3\)"),
        (np.zeros(4, np.uint8), r"uint8 \(4,\)"),
        ([[1, 2], [3, 4]], "list"),
        (Image.new("L", (4, 4)), "Image"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_grey_frame(frame: Any, words: str) -> None:
    with pytest.raises(FrameError, match=f"the frame is {words}; expected a grey uint8 array"):
        Predictor(MeanEngine())(frame)


def test_a_frame_that_is_too_small() -> None:
    with pytest.raises(FrameTooSmallError, match="1x1"):
        Predictor(MeanEngine())(np.zeros((1, 1), np.uint8))


# ---------------------------------------------------------------------------------------------- many frames


def test_batch_sizes_give_equal_results(tiny_bundle: Path, make_frame: Frame) -> None:
    frames = [make_frame(seed, 40 + seed, 70 - seed) for seed in range(20)]
    found = {
        size: judged(Predictor(tiny_bundle, device="cpu", batch_size=size).predict_frames(frames))
        for size in (1, 2, 3, 7, DEFAULT_BATCH_SIZE, 100)
    }
    assert {label for result in found[1] for label in result.quadrant_labels} == {"ASD", "NORM"}
    for results in found.values():
        assert [result.file for result in results] == [str(index) for index in range(20)]
        assert [(result.label, result.flags) for result in results] == [(r.label, r.flags) for r in found[1]]
        np.testing.assert_allclose(numbers(results), numbers(found[1]), rtol=0, atol=1e-6)


def test_files_and_arrays_give_equal_results(tiny_bundle: Path, make_frame: Frame, tmp_path: Path) -> None:
    frames = {f"{seed}.png": make_frame(seed) for seed in range(5)}
    for name, frame in frames.items():
        Image.fromarray(frame).save(tmp_path / name)
    predictor = Predictor(tiny_bundle, device="cpu")
    assert judged(predictor.predict([tmp_path])) == judged(predictor.predict_frames(frames.values(), frames))


def test_order_is_kept_with_bad_files_between(tmp_path: Path) -> None:
    expected: list[tuple[str, bool]] = []
    for index in range(23):
        name, good = f"{index:02d}.png", index % 3 != 1 and index not in (6, 8, 9, 11)
        if good:
            Image.fromarray(levels(index, index, index, index)).save(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(b"" if index % 2 else b"no image")
        expected.append((name, good))
    for size in (1, 2, 3, 7, 100):
        results = list(Predictor(MeanEngine(), batch_size=size).predict([tmp_path]))
        assert [(result.file, isinstance(result, Prediction)) for result in results] == expected
        for index, result in enumerate(results):
            if isinstance(result, Prediction):
                assert result.probabilities[1] == pytest.approx(index / 255)
            else:
                assert isinstance(result.error, FrameError)


def test_inputs_of_all_kinds_keep_their_order(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(levels(1, 2, 3, 4)).save(tmp_path / name)
    a, b, c = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    inputs = [c, FrameFile(b, "found"), str(a), tmp_path / "absent.png", FrameFile(a, "again")]
    found = list(Predictor(MeanEngine()).predict(inputs))
    assert [result.file for result in found] == [
        "c.png",
        "found",
        "a.png",
        (tmp_path / "absent.png").as_posix(),
        "again",
    ]
    assert isinstance(found[3], Failure)
    assert isinstance(found[3].error, InputNotFoundError)


@pytest.mark.parametrize("kind", [str, Path, lambda path: FrameFile(path, "a.png")], ids=["str", "Path", "FrameFile"])
def test_a_single_input_is_not_gone_through_letter_by_letter(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    Image.fromarray(levels(1, 2, 3, 4)).save(tmp_path / "a.png")
    (found,) = judged(Predictor(MeanEngine()).predict(kind(tmp_path / "a.png")))
    assert found.file == "a.png"


def test_no_inputs() -> None:
    engine = MeanEngine()
    assert list(Predictor(engine).predict([])) == []
    assert list(Predictor(engine).predict_frames([])) == []
    assert engine.calls == []


def test_nothing_but_failures_never_reaches_the_network() -> None:
    engine = MeanEngine()
    found = list(Predictor(engine, batch_size=2).predict_frames([np.zeros((1, 1), np.uint8)] * 5))
    assert [type(result) for result in found] == [Failure] * 5
    assert engine.calls == []


def test_names_must_fit_the_frames() -> None:
    predictor = Predictor(MeanEngine())
    assert [r.file for r in predictor.predict_frames([levels(1, 2, 3, 4)] * 2, ["x", "y"])] == ["x", "y"]
    with pytest.raises(ValueError, match=r"zip\(\)"):
        list(predictor.predict_frames([levels(1, 2, 3, 4)] * 2, ["x"]))


def test_the_callers_frames_are_not_changed() -> None:
    frame = levels(1, 2, 3, 4)
    before = frame.copy()
    frame.flags.writeable = False
    Predictor(MeanEngine())(frame)
    np.testing.assert_array_equal(frame, before)


# ---------------------------------------------------------------------------------------------- laziness


@pytest.mark.parametrize("size", [1, 3, 8])
def test_no_more_is_read_ahead_than_a_batch(size: int) -> None:
    taken = 0

    def endless() -> Iterator[Grey]:
        nonlocal taken
        while True:
            taken += 1
            yield levels(taken % 256, 0, 0, 0)

    results = Predictor(MeanEngine(), batch_size=size).predict_frames(endless())
    assert taken == 0
    for done in range(1, 20):
        next(results)
        assert done <= taken <= done + size - 1


def test_files_are_read_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(module, "read_frame", lambda path: read.append(path.name) or levels(1, 2, 3, 4))
    frames = [FrameFile(tmp_path / f"{index}.png", str(index)) for index in range(9)]
    results = Predictor(MeanEngine(), batch_size=4).predict(frames)
    next(results)
    assert read == ["0.png", "1.png", "2.png", "3.png"]


def test_thousands_of_bad_files_do_not_pile_up() -> None:
    taken, bad = 0, np.zeros((1, 1), np.uint8)

    def many() -> Iterator[Grey]:
        nonlocal taken
        while taken < 5000:
            taken += 1
            yield bad

    tracemalloc.start()
    for done, result in enumerate(Predictor(MeanEngine(), batch_size=8).predict_frames(many()), 1):
        assert isinstance(result, Failure)
        assert taken < done + 8
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done == 5000
    assert peak < 200_000


# ---------------------------------------------------------------------------------------------- faults


def test_other_errors_than_a_frames_are_not_swallowed() -> None:
    def broken() -> Iterator[Grey]:
        yield levels(1, 2, 3, 4)
        raise RuntimeError("the camera is gone")

    with pytest.raises(RuntimeError, match="the camera is gone"):
        list(Predictor(MeanEngine()).predict_frames(broken()))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_no_decision(value: float) -> None:
    # A graph in half precision can overflow. argmax of NaN is a class like any other.
    class Overflowing(MeanEngine):
        precision = "fp16"

        def infer(self, quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logits, probabilities = super().infer(quadrants)
            probabilities[quadrants[:, 0, 0, 0] == 255] = value
            return logits, probabilities

    frames = [levels(9, 9, 9, 9), levels(9, 255, 9, 9), levels(8, 8, 8, 8)]
    for method in ("majority", "average", "weighted"):
        found = list(Predictor(Overflowing(), method=method).predict_frames(frames))  # type: ignore[arg-type]
        assert [type(result) for result in found] == [Prediction, Failure, Prediction]
        assert isinstance(found[1], Failure)
        assert found[1].file == "1"
        assert "on cpu in fp16 is no number; try another precision" in str(found[1].error)


def test_a_bundle_that_overflows(tmp_path: Path, make_tiny_bundle: Make, make_frame: Frame) -> None:
    folder = make_tiny_bundle(tmp_path, graph={"logit_scale": float("nan")})
    with pytest.raises(FrameError, match="is no number"):
        Predictor(folder, device="cpu")(make_frame(0))


def test_importing_it_brings_no_training_code() -> None:
    import subprocess

    code = "import sys, echoquad_runtime.predictor; print([m for m in ('torch', 'onnx', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
