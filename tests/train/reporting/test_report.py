"""HTML report and its figures: hostile class names, few frames, many classes, and the choice of thresholds."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.contract import Contract
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data.dataset import LabelledFrame, Split, read_split
from echoquad_train.evaluation.evaluate import Evaluation, evaluate
from echoquad_train.evaluation.metrics import EvaluationOptions
from echoquad_train.reporting.evaluation_folder import write_evaluation
from echoquad_train.reporting.mistake_gallery import save_mistakes

NASTY = "<b>&\"' x</b>"
LONG = "a class with a very long name, longer than any figure has room for it"


class Level:
    """An engine that favours the class whose grey level is nearest to that of the quadrant."""

    device, precision, note = "cpu", "fp32", ""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract

    def infer(self, quadrants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        level = quadrants.mean(axis=(1, 2, 3), dtype=np.float64)[:, None] / 255
        logits = -20 * (level - np.linspace(0.9, 0.1, len(self.contract.classes))) ** 2
        p = np.exp(logits)
        return logits.astype(np.float32), (p / p.sum(axis=1, keepdims=True)).astype(np.float32)


class Page(HTMLParser):
    """Collects the text that a browser shows, and the addresses that it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.loaded: list[str] = []
        self.alt: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.loaded += [values[name] for name in ("src", "href", "data", "srcset") if name in values]
        self.alt += [values["alt"]] if tag == "img" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def frames(folder: Path, classes: tuple[str, ...], count: int, without: str = "") -> Split:
    """Write frames of noise around a grey level; their names contain markup."""
    rng = np.random.default_rng(3)
    found = []
    for label, name in enumerate(classes):
        for number in range(count if name != without else 0):
            path = folder / f"{label}-{number}.png"
            level = 230 - 200 * label / max(1, len(classes) - 1) + rng.normal(0, 70)
            Image.fromarray(np.clip(level + rng.normal(0, 25, (40, 48)), 0, 255).astype(np.uint8)).save(path)
            found.append(LabelledFrame(path, f"test/{name}/patient{number:02d}_{label} <i>&.png", label))
    return Split("test", classes, tuple(found))


def written(tmp_path: Path, classes: tuple[str, ...], count: int, without: str = "") -> tuple[Evaluation, Page, Any]:
    contract = Contract(tuple(sorted(classes)), input_size=16, temperature=1.3, frame_temperature=0.4)
    split = frames(tmp_path, contract.classes, count, without)
    options = EvaluationOptions(resamples=60, abstain_below=0.8)
    found = evaluate(Predictor(Level(contract)), split, options=options)
    write_evaluation(found, tmp_path / "out", gallery=3)
    out = tmp_path / "out"
    return found, Page((out / "report.html").read_text("utf-8")), json.loads((out / "metrics.json").read_text("utf-8"))


def test_report_escapes_names_embeds_pictures_and_loads_nothing(tmp_path: Path) -> None:
    found, page, metrics = written(tmp_path, (NASTY, "NORM"), 12)
    assert page.open == []  # all tags are closed
    assert "script" not in page.tags and "link" not in page.tags and "b" not in page.tags and "i" not in page.tags
    assert len(page.loaded) == 8 + len(metrics["mistakes"]) and page.alt[0].startswith("Confusion matrix")
    for source in page.loaded:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
    assert NASTY in page.text and "<i>&.png" in page.text  # names appear verbatim
    assert "Research use only. Not a medical device" in page.text and "as private as the data" in page.text
    assert metrics["contract_sha256"] in page.text
    low, high = metrics["intervals"]["accuracy"]["ci95"]
    assert f"{metrics['accuracy']:.3f} {low:.3f} to {high:.3f}" in page.text
    error = found.metrics.calibration.reported.ece
    assert f"ECE of a perfect model as reported, temperatures 1.3 and 0.4 {error:.4f}" in page.text
    assert "not chosen: there are no validation frames of other patients" in page.text
    assert f"{metrics['abstention']['at']['indeterminate']} frames are INDETERMINATE" in page.text


def test_gallery_shows_the_most_confident_mistakes_first(tmp_path: Path) -> None:
    found, page, metrics = written(tmp_path, ("a", "b", "c"), 10)
    wrong = np.flatnonzero(~found.scored.correct)
    assert len(wrong) > 3
    confident = wrong[np.argsort(-found.scored.confidence[wrong])][:3]
    assert [mistake["file"] for mistake in metrics["mistakes"]] == [found.scored.names[index] for index in confident]
    for mistake in metrics["mistakes"]:
        assert (tmp_path / "out" / mistake["picture"]).is_file()
        assert f"{mistake['true']} taken for {mistake['decided']}, {mistake['confidence']:.3f}" in page.text
    save_mistakes(found, tmp_path / "out", 1)  # removes the pictures of an earlier evaluation
    assert len(list((tmp_path / "out" / "mistakes").rglob("*.png"))) == 1


@pytest.mark.parametrize(
    ("classes", "count", "without"),
    [
        (("A", "B"), 1, ""),
        (("A", "B"), 3, "B"),
        ((LONG, LONG + "!"), 3, ""),
        (tuple(f"class {index:02d} {'心$x_{' * 3}" for index in range(12)), 2, "class 03 心$x_{心$x_{心$x_{"),
    ],
)
def test_report_of_few_frames_many_classes_or_a_missing_class(
    tmp_path: Path, classes: tuple[str, ...], count: int, without: str
) -> None:
    found, page, metrics = written(tmp_path, classes, count, without=without)
    assert page.open == []
    assert metrics["frames"] == count * (len(classes) - bool(without)) == len(found.scored)
    assert all(" ".join(name.split()) in page.text for name in classes)
    for path in (tmp_path / "out").glob("*.png"):
        with Image.open(path) as image:
            assert 500 < image.width < 2600 and 500 < image.height < 2600, (path, image.size)


def test_validation_split_is_cross_fitted_and_test_split_is_not(flat_data: Path) -> None:
    predictor = Predictor(Level(Contract(("bright", "dark"), input_size=16)))
    test, validation = (read_split(flat_data, name, ("bright", "dark")) for name in ("test", "validation"))
    crossed = evaluate(predictor, validation).metrics.to_dict()
    assert crossed["chosen_on"].startswith("cross-fitted: for each of 5 groups of patients on the others")
    assert len(crossed["operating_points"][0]["thresholds"]) == crossed["calibration"]["refitted"]["folds"] == 5
    seen: list[tuple[int, int]] = []
    chosen = evaluate(
        predictor, test, reference=validation, progress=lambda done, total: seen.append((done, total))
    ).metrics.to_dict()
    assert seen[-1] == (16, 16)
    assert chosen["chosen_on"] == "on 8 frames of 8 patients of the validation split"
    assert 0 < chosen["operating_points"][0]["threshold"] < 1
    assert "temperature" in chosen["calibration"]["refitted"]
    scaled = Predictor(Level(Contract(("bright", "dark"), input_size=16, temperature=2.0)))
    for given, expected in ((True, 2.0), (False, 1.0)):  # no temperature is optimal: every decision is correct
        options = EvaluationOptions(resamples=0, temperature_given=given)
        alone = evaluate(scaled, validation, options=options).metrics.calibration.refitted
        beside = evaluate(scaled, test, options=options, reference=validation).metrics.calibration.refitted
        assert alone is not None and beside is not None
        assert {pair.quadrants for pair in (*alone.temperatures, *beside.temperatures)} == {expected}


def test_thresholds_are_not_chosen_on_reported_patients(tmp_path: Path) -> None:
    predictor = Predictor(Level(Contract(("a", "b"), input_size=16)))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    reported, other = frames(tmp_path / "one", ("a", "b"), 4), frames(tmp_path / "two", ("a", "b"), 9)
    found = evaluate(predictor, reported, reference=other).metrics  # patients 0 to 3 are in both
    assert found.chosen_on == "on 10 frames of 5 patients of the validation split"
    alone = evaluate(predictor, reported, reference=reported).metrics
    assert alone.chosen_on.startswith("not chosen") and alone.calibration.refitted is None
    assert alone.operating_points[0].sensitivity is None


def test_frames_of_a_patient_and_class_are_one_decision(tmp_path: Path) -> None:
    predictor = Predictor(Level(Contract(("a", "b"), input_size=16)))
    found = evaluate(predictor, frames(tmp_path, ("a", "b"), 6)).metrics  # each patient has a frame of both classes
    patients = found.patients
    assert patients.unit == "patient and true class"
    assert (patients.count, patients.patients, found.intervals.patients) == (12, 6, 6)
    assert patients.accuracy == pytest.approx(np.trace(patients.confusion) / 12)
