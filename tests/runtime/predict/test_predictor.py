"""Tests of the predictor: one frame and many, votes and flags, order, laziness, sessions and errors."""

from __future__ import annotations

import dataclasses
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.contract import QUADRANTS, Contract, VoteMethod, parse_layout
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.errors import (
    BundleNotFoundError,
    ConfigError,
    FrameError,
    FrameTooSmallError,
    InputNotFoundError,
    VerificationError,
)
from echoquad_runtime.frames.decoded_frame import ColourFrame, DecodedFrame, GreyFrame
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.reader import cut_frame
from echoquad_runtime.predict import predictor as module
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.predict.worker_pool import FrameTask
from echoquad_runtime.quadrants import Grey, frame_quadrants

Make = Callable[..., Path]
Frame = Callable[..., Grey]


class MeanEngine:
    """An engine whose probability of class 1 is the mean grey level over 255. It records the size of each call."""

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
    """Return a frame of four flat quadrants LA, RA, LV, RV; flat quadrants are flagged as without a signal."""
    return np.kron(np.array(quadrants, np.uint8).reshape(2, 2), np.ones((8, 8), np.uint8))


def striped(*quadrants: int) -> Grey:
    """Return a frame of four striped quadrants with these means, 50 to 195: they have a signal and are not white."""
    stripes = np.tile(np.array([-50, 50], np.int16), (8, 4))
    return (levels(*quadrants).astype(np.int16) + np.tile(stripes, (2, 2))).astype(np.uint8)


def predictions(results: Iterator[Prediction | Failure]) -> list[Prediction]:
    found = list(results)
    assert all(isinstance(result, Prediction) for result in found), found
    return found  # type: ignore[return-value]


def numbers(results: Sequence[Prediction]) -> np.ndarray:
    return np.array([result.quadrant_probabilities for result in results])


# ---------------------------------------------------------------------------------------------- one frame


def test_prediction_fields(tiny_bundle: Path, make_frame: Frame) -> None:
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


def test_accepts_folder_bundle_and_engine(tiny_bundle: Path, make_frame: Frame) -> None:
    bundle = Bundle(tiny_bundle)
    engine = OnnxEngine(bundle, device="cpu")
    frame = make_frame(0)
    found = {Predictor(model)(frame) for model in (tiny_bundle, str(tiny_bundle), bundle, engine)}
    assert len(found) == 1
    with pytest.raises(BundleNotFoundError):
        Predictor(tiny_bundle / "absent")


@pytest.mark.parametrize("method", ["majority", "average", "weighted"])
@pytest.mark.parametrize("layout", [",".join(names) for names in permutations(QUADRANTS)])
def test_columns_follow_the_quadrant_layout(layout: str, method: VoteMethod) -> None:
    """The values of LA are those of the pixels at the position that the layout calls LA."""
    means = dict(zip(parse_layout(layout), (68, 85, 102, 187), strict=True))
    weights = (0.0, 0.0, 0.0, 1.0)  # RV alone decides
    engine = MeanEngine(vote=method, vote_weights=weights, quadrants=parse_layout(layout))
    found = Predictor(engine)(striped(68, 85, 102, 187))
    assert [round(row[1] * 255) for row in found.quadrant_probabilities] == [means[name] for name in QUADRANTS]
    assert round(found.probabilities[1] * 255, 3) == 110.5
    assert found.label == ("light" if method == "weighted" and means["RV"] == 187 else "dark")


@pytest.mark.parametrize(("layout", "flag"), [("reference", "no-signal-RA"), ("apex-up", "no-signal-LV")])
def test_flag_names_the_quadrant_without_signal(layout: str, flag: str) -> None:
    frame = striped(100, 100, 100, 100)
    frame[:8, 8:] = 100
    assert Predictor(MeanEngine(quadrants=parse_layout(layout)))(frame).flags == (flag,)


def test_quadrants_are_in_fixed_order() -> None:
    found = Predictor(MeanEngine())(striped(68, 85, 102, 187))
    assert [round(row[1], 3) for row in found.quadrant_probabilities] == [0.267, 0.333, 0.4, 0.733]
    assert found.quadrant_labels == ("dark", "dark", "dark", "light")
    assert (found.label, found.flags) == ("dark", ())
    assert found.probabilities[1] == pytest.approx(0.43333, abs=1e-5)


def test_vote_methods() -> None:
    frame = levels(110, 110, 110, 255)  # three votes for dark, and a mean that is light
    engine = MeanEngine(vote_weights=(10.0, 0.0, 0.0, 1.0), vote="average")
    found = {method: Predictor(engine, method=method)(frame) for method in ("majority", "average", "weighted")}
    assert {method: result.label for method, result in found.items()} == {
        "majority": "dark",
        "average": "light",
        "weighted": "dark",
    }
    assert all(result.method == method for method, result in found.items())
    assert len({result.probabilities for result in found.values()}) == 1  # the plain mean, whatever the method
    assert Predictor(engine)(frame) == found["average"]  # the contract's method


@pytest.mark.parametrize(
    ("quadrants", "method", "flags"),
    [
        ((70, 70, 190, 190), "majority", ("tie",)),
        ((70, 100, 150, 190), "majority", ("tie",)),
        ((70, 70, 70, 190), "majority", ()),
        ((190,) * 4, "majority", ()),
        ((70, 70, 190, 190), "average", ()),
        ((70, 70, 190, 190), "weighted", ()),
    ],
)
def test_tie_is_flagged(quadrants: tuple[int, ...], method: Any, flags: tuple[str, ...]) -> None:
    found = Predictor(MeanEngine(), method=method)(striped(*quadrants))
    assert found.flags == flags
    if flags:
        assert found.label == found.classes[int(np.argmax(found.probabilities))]


def test_frame_without_signal_is_flagged(tmp_path: Path) -> None:
    frames = {"black": levels(0, 0, 0, 0), "white": levels(255, 255, 255, 255), "half": striped(70, 70, 190, 190)}
    frames["half"][:8, :8] = 0  # LA is blank; the vote is a tie
    for name, frame in frames.items():
        Image.fromarray(frame).save(tmp_path / f"{name}.png")
    predictor = Predictor(MeanEngine())
    expected = {"black": ("blank",), "half": ("no-signal-LA", "tie"), "white": ("blank", "saturated")}
    assert {one.file.removesuffix(".png"): one.flags for one in predictions(predictor.predict(tmp_path))} == expected
    assert {name: predictor(frame).flags for name, frame in frames.items()} == expected
    assert predictor((tmp_path / "half.png").read_bytes()).flags == expected["half"]


@pytest.mark.parametrize("options", [{"method": "plurality"}, {"batch_size": 0}, {"batch_size": -1}, {"time_limit": 0}])
def test_options_out_of_range_raise(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r" is .*; expected"):
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
def test_array_that_is_not_grey_uint8_raises(frame: Any, words: str) -> None:
    with pytest.raises(FrameError, match=f"the frame is {words}; expected a grey uint8 array"):
        Predictor(MeanEngine())(frame)


def test_too_small_frame_raises() -> None:
    with pytest.raises(FrameTooSmallError, match="1x1"):
        Predictor(MeanEngine())(np.zeros((1, 1), np.uint8))


# ---------------------------------------------------------------------------------------------- many frames


def test_batch_size_does_not_change_results(tiny_bundle: Path, make_frame: Frame) -> None:
    frames = [make_frame(seed, 40 + seed, 70 - seed) for seed in range(20)]
    found = {
        size: predictions(Predictor(tiny_bundle, device="cpu", batch_size=size).predict_frames(frames))
        for size in (None, 1, 2, 3, 7, 100)
    }
    assert {label for result in found[1] for label in result.quadrant_labels} == {"ASD", "NORM"}
    for results in found.values():
        assert [result.file for result in results] == [str(index) for index in range(20)]
        assert [(result.label, result.flags) for result in results] == [(r.label, r.flags) for r in found[1]]
        np.testing.assert_allclose(numbers(results), numbers(found[1]), rtol=0, atol=1e-6)


def test_files_and_arrays_give_equal_predictions(tiny_bundle: Path, make_frame: Frame, tmp_path: Path) -> None:
    frames = {f"{seed}.png": make_frame(seed) for seed in range(5)}
    for name, frame in frames.items():
        Image.fromarray(frame).save(tmp_path / name)
    predictor = Predictor(tiny_bundle, device="cpu")
    assert predictions(predictor.predict([tmp_path])) == predictions(predictor.predict_frames(frames.values(), frames))


def test_failures_keep_input_order(tmp_path: Path) -> None:
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


def test_mixed_inputs_keep_input_order(tmp_path: Path) -> None:
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
def test_single_input_is_not_iterated(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    Image.fromarray(levels(1, 2, 3, 4)).save(tmp_path / "a.png")
    (found,) = predictions(Predictor(MeanEngine()).predict(kind(tmp_path / "a.png")))
    assert found.file == "a.png"


def test_empty_input_gives_no_result() -> None:
    engine = MeanEngine()
    assert list(Predictor(engine).predict([])) == []
    assert list(Predictor(engine).predict_frames([])) == []
    assert engine.calls == []


def test_failures_do_not_run_the_network() -> None:
    engine = MeanEngine()
    found = list(Predictor(engine, batch_size=2).predict_frames([np.zeros((1, 1), np.uint8)] * 5))
    assert [type(result) for result in found] == [Failure] * 5
    assert engine.calls == []


def test_number_of_names_must_match_frames() -> None:
    predictor = Predictor(MeanEngine())
    assert [r.file for r in predictor.predict_frames([levels(1, 2, 3, 4)] * 2, ["x", "y"])] == ["x", "y"]
    with pytest.raises(ValueError, match=r"zip\(\)"):
        list(predictor.predict_frames([levels(1, 2, 3, 4)] * 2, ["x"]))


def test_input_frame_is_not_modified() -> None:
    frame = levels(1, 2, 3, 4)
    before = frame.copy()
    frame.flags.writeable = False
    Predictor(MeanEngine())(frame)
    np.testing.assert_array_equal(frame, before)


# ---------------------------------------------------------------------------------------------- laziness


@pytest.mark.parametrize("size", [1, 3, 8])
def test_frames_in_flight_are_bounded(size: int) -> None:
    taken = 0

    def endless() -> Iterator[Grey]:
        nonlocal taken
        while True:
            taken += 1
            yield levels(taken % 256, 0, 0, 0)

    predictor = Predictor(MeanEngine(), batch_size=size)
    results = predictor.predict_frames(endless())
    assert taken == 0
    for done in range(1, 40):
        next(results)
        assert done <= taken <= done + max(2 * size, predictor.threads + 1)
    results.close()  # type: ignore[attr-defined]


def test_failures_do_not_accumulate_in_memory() -> None:
    taken, bad = 0, np.zeros((1, 1), np.uint8)

    def many() -> Iterator[Grey]:
        nonlocal taken
        while taken < 5000:
            taken += 1
            yield bad

    tracemalloc.start()
    for done, result in enumerate(Predictor(MeanEngine(), batch_size=8).predict_frames(many()), 1):
        assert isinstance(result, Failure)
        assert taken < done + 100
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done == 5000
    assert peak < 300_000


# ---------------------------------------------------------------------------------------------- sessions


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the threads of every session that a predictor opens."""
    found: list[int] = []

    def record(*arguments: Any, **options: Any) -> OnnxEngine:
        found.append(options["threads"])
        return OnnxEngine(*arguments, **options)

    monkeypatch.setattr(module, "OnnxEngine", record)
    return found


def test_one_frame_uses_all_threads_and_many_use_one_each(
    tiny_bundle: Path, make_frame: Frame, opened: list[int]
) -> None:
    frames = [make_frame(seed) for seed in range(9)]
    predictor = Predictor(tiny_bundle, device="cpu", threads=3)
    alone = [predictor(frame) for frame in frames]
    few = predictions(predictor.predict_frames(frames[:3]))
    assert opened == [3]
    many = predictions(predictor.predict_frames(frames))
    assert opened == [3, 1]
    assert few == many[:3]  # bit for bit, whatever session computed it
    assert [dataclasses.replace(one, file=str(index)) for index, one in enumerate(alone)] == many


def test_concurrent_predictor_opens_one_session(tiny_bundle: Path, make_frame: Frame, opened: list[int]) -> None:
    predictor = Predictor(tiny_bundle, device="cpu", threads=2, concurrent=True)
    assert len(predictions(predictor.predict_frames(make_frame(seed) for seed in range(7)))) == 7
    assert opened == [1]
    predictor(make_frame(0))
    assert opened == [1, 2]


def test_one_thread_opens_one_session(tiny_bundle: Path, make_frame: Frame, opened: list[int]) -> None:
    predictor = Predictor(tiny_bundle, device="cpu", threads=1)
    predictor(make_frame(0))
    predictions(predictor.predict_frames(make_frame(seed) for seed in range(7)))
    assert opened == [1]


def test_encoded_frames_give_same_predictions_as_files(tiny_bundle: Path, frames_folder: Path) -> None:
    predictor = Predictor(tiny_bundle, device="cpu")
    paths = sorted(path for path in frames_folder.rglob("*") if path.is_file())
    from_files = predictions(predictor.predict(frames_folder))
    items = [(path.relative_to(frames_folder).as_posix(), path.read_bytes()) for path in paths]
    assert predictions(predictor.predict_encoded(items)) == from_files
    found = list(predictor.predict_encoded([*items, ("bad.png", b"no image")]))
    assert isinstance(found[-1], Failure)
    assert [predictor(data, name) for name, data in items] == from_files


def test_frames_that_load_themselves_give_same_predictions_as_files(tiny_bundle: Path, frames_folder: Path) -> None:
    predictor = Predictor(tiny_bundle, device="cpu")
    colours = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(colours).save(frames_folder / "c.png")
    decoded: dict[str, DecodedFrame] = {"c.png": ColourFrame(colours)}
    for name in ("a/0.png", "b/5.png"):
        decoded[name] = GreyFrame(np.asarray(Image.open(frames_folder / name)))
    tasks = [FrameTask(name, partial(cut_frame, frame, predictor.contract)) for name, frame in decoded.items()]
    files = [FrameFile(frames_folder / name, name) for name in decoded]
    assert predictions(predictor.predict_tasks(tasks)) == predictions(predictor.predict(files))
    assert predictor.bundle is not None
    assert predictor.bundle.folder == tiny_bundle


def test_on_decision_is_called_and_its_error_becomes_failure(tiny_bundle: Path, frames_folder: Path) -> None:
    (frames_folder / "c.png").write_bytes(b"")
    seen: dict[str, Prediction] = {}

    def look(file: FrameFile, prediction: Prediction) -> None:
        assert file.path == frames_folder / file.name
        seen[file.name] = prediction
        if file.name == "a/1.jpg":
            raise FrameError("cannot draw")

    found = list(Predictor(tiny_bundle, device="cpu").predict(frames_folder, look))
    failed = [one.file for one in found if isinstance(one, Failure)]
    assert failed == ["a/1.jpg", "c.png"]
    assert [one for one in found if isinstance(one, Prediction)] == [
        one for name, one in sorted(seen.items()) if name != "a/1.jpg"
    ]
    assert sorted(seen) == sorted(one.file for one in found if one.file != "c.png")


def test_file_over_time_limit_becomes_failure(
    tiny_bundle: Path, frames_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, read = threading.Event(), module.load_quadrants

    def load(file: FrameFile, *rest: Any, **options: Any) -> Any:
        return release.wait() if file.path.name == "1.jpg" else read(file, *rest, **options)

    monkeypatch.setattr(module, "load_quadrants", load)
    found = list(Predictor(tiny_bundle, device="cpu", time_limit=0.2).predict(frames_folder))
    release.set()
    assert [one.file for one in found if isinstance(one, Failure)] == ["a/1.jpg"]
    assert len(found) == 6


def test_predictor_is_thread_safe(tiny_bundle: Path, make_frame: Frame) -> None:
    predictor = Predictor(tiny_bundle, device="cpu", threads=2)
    frames = [make_frame(seed) for seed in range(8)]
    expected = [predictor(frame) for frame in frames]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            assert list(pool.map(predictor, frames)) == expected


# ---------------------------------------------------------------------------------------------- errors


def test_unrelated_input_error_is_raised() -> None:
    def broken() -> Iterator[Grey]:
        yield levels(1, 2, 3, 4)
        raise RuntimeError("the camera is gone")

    with pytest.raises(RuntimeError, match="the camera is gone"):
        list(Predictor(MeanEngine()).predict_frames(broken()))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_answer_that_is_not_finite_becomes_failure(value: float) -> None:
    # A half-precision graph can overflow, and argmax of NaN would return a class.
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
        assert "on cpu in fp16 is not a number; try another precision" in str(found[1].error)


def test_bundle_with_nan_logits_fails_self_test(tmp_path: Path, make_tiny_bundle: Make, make_frame: Frame) -> None:
    folder = make_tiny_bundle(tmp_path, graph={"logit_scale": float("nan")})
    with pytest.raises(VerificationError, match="the self-test failed on cpu in fp32"):
        Predictor(folder, device="cpu")
    with pytest.raises(FrameError, match="is not a number"):
        Predictor(folder, device="cpu", self_test=False)(make_frame(0))


def test_import_does_not_load_training_code() -> None:
    import subprocess

    code = "import sys, echoquad_runtime.predict.predictor; print({'torch', 'onnx', 'typer'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
