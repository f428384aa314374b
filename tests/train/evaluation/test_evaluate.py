from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sklearn_metrics

from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.errors import DatasetError, OutputError
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.voting import aggregate_votes
from echoquad_train.data.dataset import read_split
from echoquad_train.evaluation.evaluate import evaluate
from echoquad_train.evaluation.intervals import wilson_interval
from echoquad_train.evaluation.metrics import measure, roc_curves
from echoquad_train.plot_style import save
from echoquad_train.reporting import score_figures as figures_scores
from echoquad_train.reporting.evaluation_folder import write_evaluation
from echoquad_train.runs.history import Epoch
from echoquad_train.runs.training_curves import training_curves


def predictions(
    quadrants: Sequence[Sequence[Sequence[float]]], classes: Sequence[str], method: Any = "majority"
) -> list[Prediction]:
    """Make predictions from probabilities [F, 4, C], voted on as the runtime does."""
    p = np.array(quadrants, float)
    decision = aggregate_votes(p, method, (1, 1, 1.5, 1.5))
    return [
        Prediction(
            file=f"{index}.png",
            classes=tuple(classes),
            method=method,
            label=classes[decision.labels[index]],
            probabilities=tuple(decision.probabilities[index].tolist()),
            quadrant_labels=tuple(classes[label] for label in decision.quadrant_labels[index]),
            quadrant_probabilities=tuple(tuple(row) for row in p[index].tolist()),
            flags=(),
            device="cpu",
            precision="fp32",
        )
        for index in range(len(p))
    ]


def two(*rows: Sequence[float]) -> list[list[list[float]]]:
    """Four quadrants' probabilities of ASD, a frame a row."""
    return [[[p, 1 - p] for p in row] for row in rows]


# Figures by hand


def test_a_small_example_by_hand() -> None:
    """Three ASD, two NORM: one ASD is missed, one NORM is taken for ASD."""
    found = measure(
        predictions(
            two(
                [0.9, 0.8, 0.7, 0.6],  # ASD, all right
                [0.9, 0.2, 0.7, 0.6],  # ASD, RA wrong
                [0.1, 0.2, 0.3, 0.6],  # ASD taken for NORM: only RV right
                [0.4, 0.3, 0.2, 0.1],  # NORM, all right
                [0.6, 0.7, 0.8, 0.4],  # NORM taken for ASD: only RV right
            ),
            ("ASD", "NORM"),
        ),
        np.array([0, 0, 0, 1, 1]),
        "ASD",
    )
    assert found["frames"] == 5 and found["accuracy"] == 3 / 5
    assert found["confusion"] == [[2, 1], [1, 1]]
    assert found["per_class"]["ASD"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert found["per_class"]["NORM"] == pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2})
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["per_quadrant"] == pytest.approx({"LA": 3 / 5, "RA": 2 / 5, "LV": 3 / 5, "RV": 5 / 5})
    assert found["patch_accuracy"] == pytest.approx((3 + 2 + 3 + 5) / 20)
    # Mean probabilities 0.75, 0.6, 0.3 of ASD against 0.25, 0.625: 4 of 6 pairs are in order.
    assert found["roc_auc"] == pytest.approx(4 / 6)
    assert found["accuracy_ci95"] == list(wilson_interval(3, 5))
    assert found["classes"] == ["ASD", "NORM"] and found["positive"] == "ASD"
    json.dumps(found, allow_nan=False)


def pairs_in_order(score: np.ndarray, truth: np.ndarray) -> float:
    above, below = score[truth][:, None], score[~truth][None, :]
    return float(np.mean((above > below) + 0.5 * (above == below)))


@pytest.mark.parametrize("classes", [("ASD", "NORM"), ("a", "b", "c"), ("1", "2", "3", "4", "5")])
@pytest.mark.parametrize("method", ["majority", "average", "weighted"])
def test_random_decisions_against_sklearn_and_the_definition(classes: tuple[str, ...], method: str) -> None:
    rng = np.random.default_rng(len(classes))
    p = rng.dirichlet(np.ones(len(classes)), (200, 4)).round(2)
    p /= p.sum(axis=2, keepdims=True)
    labels = rng.integers(0, len(classes), 200)
    made = predictions(p, classes, method)
    found = measure(made, labels, classes[-1])
    decided = np.array([classes.index(prediction.label) for prediction in made])
    assert found["accuracy"] == sklearn_metrics.accuracy_score(labels, decided)
    assert found["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, decided))
    assert found["confusion"] == sklearn_metrics.confusion_matrix(labels, decided).tolist()
    report = sklearn_metrics.classification_report(labels, decided, target_names=classes, output_dict=True)
    for name in classes:
        expected = {key.replace("f1-score", "f1"): value for key, value in report[name].items()}
        assert found["per_class"][name] == pytest.approx(expected)
    mean = p.mean(axis=1)
    wanted = [len(classes) - 1] if len(classes) == 2 else range(len(classes))
    areas = [pairs_in_order(mean[:, index], labels == index) for index in wanted]
    assert found["roc_auc"] == pytest.approx(np.mean(areas))


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_no_area_where_a_class_lacks(labels: list[int]) -> None:
    made = predictions(two([0.9] * 4, [0.1] * 4, [0.6] * 4), ("ASD", "NORM"))
    found = measure(made, np.array(labels), "ASD")
    assert found["roc_auc"] is None
    assert found["balanced_accuracy"] == found["accuracy"]
    assert len(found["confusion"]) == 2 and found["per_class"]["ASD"]["support"] == 3 - sum(labels)
    json.dumps(found, allow_nan=False)


def test_no_area_where_one_of_three_classes_lacks() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(3), (20, 4))
    labels = np.arange(20) % 2
    assert measure(predictions(p, ("a", "b", "c")), labels, "a")["roc_auc"] is None
    curves = roc_curves(p.mean(axis=1), labels, ("a", "b", "c"), "a")
    assert [name for name, *_ in curves] == ["a", "b"]  # drawn for those that can be


def test_the_positive_class_is_the_one_the_curve_is_of() -> None:
    made = predictions(two([0.9] * 4, [0.2] * 4, [0.6] * 4, [0.7] * 4), ("ASD", "NORM"))
    labels = np.array([0, 0, 1, 1])
    asd, norm = (measure(made, labels, name)["roc_auc"] for name in ("ASD", "NORM"))
    assert asd == norm == pytest.approx(0.5)
    labels = np.array([0, 1, 0, 0])
    ((name, false_positive, true_positive, area),) = roc_curves(
        np.array([prediction.probabilities for prediction in made]), labels, ("ASD", "NORM"), "NORM"
    )
    assert (name, area) == ("NORM", 1.0) and false_positive[-1] == true_positive[-1] == 1


# The interval


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_as_published(right: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(count - right, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 10**6])
def test_wilsons_interval_at_its_ends(count: int) -> None:
    z2 = 1.959963984540054**2
    none, every = wilson_interval(0, count), wilson_interval(count, count)
    assert none[0] == 0.0 and none[1] == pytest.approx(z2 / (count + z2))
    assert every[1] == 1.0 and every[0] == pytest.approx(count / (count + z2))
    for right in {0, 1, count // 2, count}:
        low, high = wilson_interval(right, count)
        assert 0 <= low <= right / count <= high + 1e-12 <= 1 + 1e-12


def test_wilsons_interval_solves_its_equation() -> None:
    for bound in wilson_interval(30, 45):
        assert (30 / 45 - bound) / math.sqrt(bound * (1 - bound) / 45) == pytest.approx(
            math.copysign(1.959963984540054, 30 / 45 - bound)
        )


# A split


class Brightness:
    """An engine that is the surer of `bright` the brighter a quadrant is."""

    device, precision = "cpu", "fp32"

    def __init__(self, contract: Contract) -> None:
        self.contract = contract

    def infer(self, quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bright = quadrants.mean(axis=(1, 2, 3), dtype=np.float32)[:, None] / 255
        p = np.concatenate(
            [bright, *[(1 - bright) / (len(self.contract.classes) - 1)] * (len(self.contract.classes) - 1)], 1
        )
        return np.log(p + 1e-6), p


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(Brightness(Contract(("bright", "dark"), input_size=16)), batch_size=3)


KEYS = {
    "split", "frames", "accuracy", "accuracy_ci95", "roc_auc", "confusion", "classes", "per_class", "per_quadrant",
}  # fmt: skip


def test_a_split_is_evaluated(predictor: Predictor, flat_data: Path) -> None:
    seen: list[tuple[int, int]] = []
    split = read_split(flat_data, "test", ("bright", "dark"))
    found = evaluate(predictor, split, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(1, 9)]
    assert set(found.metrics) >= KEYS and set(found.metrics["per_quadrant"]) == set(QUADRANTS)
    assert (found.metrics["split"], found.metrics["frames"], found.metrics["accuracy"]) == ("test", 8, 1.0)
    assert found.metrics["roc_auc"] == 1.0 and found.metrics["unreadable"] == 0
    assert (found.metrics["device"], found.metrics["precision"], found.metrics["method"]) == ("cpu", "fp32", "majority")
    assert found.metrics["contract_sha256"] == predictor.contract.sha256
    assert [prediction.file for prediction in found.predictions] == [frame.name for frame in split.frames]
    assert found.labels.tolist() == [0] * 4 + [1] * 4


def test_frames_that_cannot_be_read_shift_no_label(
    tmp_path: Path, make_data: Callable[..., Path], predictor: Predictor
) -> None:
    data = make_data(tmp_path / "data", frames=3, splits=("test",))
    for name in ("test/bright/test0.png", "test/dark/test2.png"):
        (data / name).write_bytes(b"")
    split = read_split(data, "test", ("bright", "dark"))
    found = evaluate(predictor, split)
    assert found.metrics["accuracy"] == 1.0 and found.metrics["frames"] == 4 and found.metrics["unreadable"] == 2
    assert [failure.file for failure in found.failures] == ["test/bright/test0.png", "test/dark/test2.png"]
    for frame in split.frames:
        frame.path.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"test: no frame can be read; the first failure: test/bright/test0\.png: "):
        evaluate(predictor, split)


def png_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


@pytest.mark.parametrize("classes", [("bright", "dark"), ("bright", "心房", "zz$x_{$")])
def test_an_evaluation_is_written(tmp_path: Path, make_data: Callable[..., Path], classes: tuple[str, ...]) -> None:
    data = make_data(tmp_path / "data", classes, splits=("test",))
    ordered = tuple(sorted(classes))
    found = evaluate(Predictor(Brightness(Contract(ordered, input_size=16))), read_split(data, "test", ordered))
    paths = write_evaluation(found, tmp_path / "new" / "out")
    assert [path.name for path in paths] == [
        *["metrics.json", "predictions.csv", "confusion.png", "roc.png", "precision_recall.png", "reliability.png"],
        *["probabilities.png", "quadrants.png", "agreement.png", "risk_coverage.png", "report.html"],
    ]
    assert json.loads(paths[0].read_text("utf-8")) == found.metrics | {"mistakes": []}
    with paths[1].open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [prediction.file for prediction in found.predictions]
    assert [row["pred_image"] for row in rows] == [prediction.label for prediction in found.predictions]
    for path in paths[2:-1]:
        width, height = png_size(path)
        assert 500 < width < 1500 and 500 < height < 1500
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_evaluation(found, tmp_path / "file" / "out")


# Figures


@pytest.mark.parametrize("count", [2, 5, 12])
def test_a_confusion_matrix_shows_counts_and_shares(tmp_path: Path, count: int) -> None:
    matrix = np.arange(count * count).reshape(count, count)
    matrix[0] = 0  # a class without a frame divides by nothing
    classes = [f"class {index}" for index in range(count)]
    figure = figures_scores.confusion(matrix, classes, "test: accuracy")
    axes = figure.axes[0]
    words = [text.get_text() for text in axes.texts]
    assert words[0] == "0\n0.0%" and words[count] == f"{count}\n{count / matrix[1].sum():.1%}"
    assert [label.get_text() for label in axes.get_yticklabels()] == classes
    assert axes.get_xlabel() == "decided" and axes.get_ylabel() == "true"
    save(figure, tmp_path / "confusion.png")
    width, height = png_size(tmp_path / "confusion.png")
    assert 600 < width < 2200 and 600 < height < 2200


def test_roc_curves_are_drawn(tmp_path: Path) -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(9), 60)
    labels = np.arange(60) % 9
    for curve in (roc_curves(p, labels, tuple("abcdefghi"), "a"), []):
        figure = figures_scores.roc(curve, "test: 60 frames")
        lines = figure.axes[0].lines
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 1 + len(curve)
        save(figure, tmp_path / "roc.png")
        width, height = png_size(tmp_path / "roc.png")
        assert width == 960 and 900 <= height < 1300


@pytest.mark.parametrize("count", [1, 2, 20])
def test_curves_are_drawn(tmp_path: Path, count: int) -> None:
    history = [Epoch(n, "all", 1e-3, 1 / n, 0.5, 1.2 / n, 0.4, 1 - 0.5 / n, 1.0) for n in range(1, count + 1)]
    figure = training_curves(history)
    assert f"in epoch {count}" in figure.axes[1].get_legend().get_texts()[-1].get_text()
    save(figure, tmp_path / "curves.png")
    assert png_size(tmp_path / "curves.png") == (1350, 570)
    assert not any(axes.patches for axes in figure.axes)
    for axes in training_curves(history, 12).axes:  # of which as many are shaded as have been
        (shade,) = axes.patches
        assert shade.get_x() == 0.5 and shade.get_width() == min(count, 12)
        assert axes.get_legend().get_texts()[-1].get_text() == "smaller quadrants"


def test_a_figure_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "roc.png"
    path.write_bytes(b"old")
    figure = figures_scores.roc([], "x")

    def broken(stream: Any, **_: Any) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", broken)
    with pytest.raises(KeyboardInterrupt):
        save(figure, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
