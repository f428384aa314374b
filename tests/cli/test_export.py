"""``echoquad export``, ``verify`` and ``evaluate``: from a run to a bundle, and what the two have in common."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DECISIONS = ("pred_image", "pred_LA", "pred_RA", "pred_LV", "pred_RV", "method", "flags")


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return {row["file"]: row for row in csv.DictReader(stream)}


def test_export(exported: tuple[Path, Any], left_in: Callable[..., Any]) -> None:
    folder, ran = exported
    lines = ran.out.splitlines()
    assert lines[0].split("  ")[0] == "precision"
    assert [line.split()[:2] for line in lines[2:]] == [["fp32", "1"], ["fp32", "2"], ["fp32", "5"], ["fp32", "16"]]
    assert all(line.split()[-2:] == ["0", "0"] for line in lines[2:])
    assert "parity passed on 4 validation frames" in ran.err
    assert ran.err.splitlines()[-1] == f"wrote {folder.as_posix()}/; next: echoquad predict {folder.as_posix()} INPUT"
    assert {path.name for path in folder.iterdir()} == {"bundle.json", "model.fp32.onnx", "golden.npz", "MODEL_CARD.md"}
    assert left_in(folder.parent) == []


REFUSED = {
    "fp8": (2, "--precision 'fp8': expected some of fp32, fp16, int8, separated by commas"),
    ",": (2, "expected some of fp32, fp16, int8"),
}

# A graph that is there already takes the place of the slow export; no difference at all is allowed to it.
STRICT = """
from pathlib import Path
from echoquad_export.packing import exporter as pack
from echoquad_export.parity import parity
graph, build_graph, gates = Path({graph!r}).read_bytes(), pack.build_graph, parity.GATES
pack.build_graph = lambda model, contract: graph
parity.GATES = {{"fp32": parity.Gate(-1.0, 1e-4, 0.0, 0.0)}}
"""
AGAIN = "pack.build_graph, parity.GATES = build_graph, gates"


def test_a_missed_parity_leaves_nothing(
    trained: tuple[Path, Any],
    exported: tuple[Path, Any],
    warm: Callable[..., Any],
    left_in: Callable[..., Any],
    tmp_path: Path,
) -> None:
    older = Path(shutil.copytree(exported[0], tmp_path / "bundle"))
    before = {path.name: path.read_bytes() for path in older.iterdir()}
    strict = STRICT.format(graph=str(exported[0] / "model.fp32.onnx"))
    (ran,) = warm([["python", strict], ["export", trained[0], "--out", older], ["python", AGAIN]])
    assert (ran.code, ran.out) == (3, "")
    assert ran.errors[0].startswith("parity: the fp32 graph does not decide as the training code does on 4 frames")
    assert "|dlogit| " in ran.errors[0]
    assert ran.errors[0].endswith("no bundle was written")
    assert {path.name: path.read_bytes() for path in older.iterdir()} == before  # the one that was there is still good
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert left_in(tmp_path) == []


def test_refusals(trained: tuple[Path, Any], data: Path, warm: Callable[..., Any], tmp_path: Path) -> None:
    run, out = trained[0], tmp_path / "bundle"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    refusals = [
        *((code, ["export", run, "--out", out, "--precision", name], words) for name, (code, words) in REFUSED.items()),
        (2, ["export", run, "--out", out, "--calibrate", data], "--calibrate: only int8 is calibrated"),
        (1, ["export", tmp_path / "none", "--out", out], "no run here (run.json is missing)"),
        (1, ["export", tmp_path / "run", "--out", out], "run.json cannot be read"),
        (1, ["export", data, "--out", out], "no run here (run.json is missing)"),
        (1, ["export", run, "--out", tmp_path / "full"], "is there and is no bundle; it is left as it is"),
        (1, ["export", run, "--out", out, "--parity", tmp_path / "none"], "no such folder"),
        (1, ["evaluate", tmp_path / "none", data, "--out", out], "none: no such folder; expected a run or a bundle"),
        (1, ["evaluate", tmp_path / "full", data, "--out", out], "neither a run (run.json) nor a bundle (bundle.json)"),
        (2, ["evaluate", run, data, "--out", out, "--precision", "fp16"], "--precision fp16: a run is evaluated in"),
        (1, ["evaluate", run, tmp_path / "none", "--out", out], "none: no such folder"),
        (1, ["evaluate", run, data, "--out", out, "--split", "rest"], "no rest/ folder, only test, train, validation"),
        (1, ["evaluate", run, data, "--out", tmp_path / "full" / "thesis.tex"], "cannot be written"),
    ]
    found = warm([line for _, line, _ in refusals])
    for (code, line, words), ran in zip(refusals, found, strict=True):
        assert (ran.code, ran.out, len(ran.errors)) == (code, "", 1), (line, ran)
        assert words in ran.errors[0], line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "run", "run.json", "thesis.tex"]


@pytest.fixture(scope="module")
def evaluations(
    trained: tuple[Path, Any],
    exported: tuple[Path, Any],
    data: Path,
    warm: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Any]]:
    """Give the folder that each of run and bundle was evaluated into, and what was printed."""
    folder = tmp_path_factory.mktemp("evaluations")
    models = {"run": trained[0], "bundle": exported[0]}
    found = warm([["evaluate", model, data, "--out", folder / name] for name, model in models.items()])
    return {name: (folder / name, ran) for name, ran in zip(models, found, strict=True)}


@pytest.mark.parametrize("model", ["run", "bundle"])
def test_evaluate(model: str, evaluations: dict[str, tuple[Path, Any]], left_in: Callable[..., Any]) -> None:
    folder, ran = evaluations[model]
    assert ran.code == 0
    files = ["metrics.json", "predictions.csv", "report.html"]
    pictures = [
        "agreement",
        "confusion",
        "precision_recall",
        "probabilities",
        "quadrants",
        "reliability",
        "risk_coverage",
    ]
    files += [f"{name}.png" for name in [*pictures, "roc"]]
    assert {path.name for path in folder.iterdir()} - {"mistakes"} == set(files)
    assert left_in(folder.parent) == []
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    wanted = "split frames accuracy accuracy_ci95 roc_auc confusion classes per_class per_quadrant device precision"
    assert set(wanted.split()) <= metrics.keys()
    assert (metrics["split"], metrics["frames"], metrics["classes"]) == ("test", 4, ["ASD", "NORM"])

    lines = ran.out.splitlines()
    assert lines[0].startswith(f"frame accuracy {metrics['accuracy']:.4f} (95 % interval ")
    assert lines[0].endswith(", 4 frames")
    assert lines[2].startswith("quadrants      LA ") and lines[3].startswith("by patient     ")
    head = lines.index("") + 1
    assert lines[head].split() == ["class", "precision", "recall", "F1", "frames", "as", "ASD", "as", "NORM"]
    assert [line.split()[0] for line in lines[head + 2 :]] == ["ASD", "NORM"]
    assert "test: 4 frames and 4 of validation for the thresholds on cpu in fp32" in ran.err
    assert all(f"{folder.as_posix()}/{name}" in ran.err for name in files)


def test_run_bundle_and_predict_decide_alike(
    evaluations: dict[str, tuple[Path, Any]],
    exported: tuple[Path, Any],
    data: Path,
    echoquad: Callable[..., Any],
    tmp_path: Path,
) -> None:
    echoquad("predict", exported[0], data / "test", "--out", tmp_path / "decisions.csv")
    predicted = {f"test/{name}": row for name, row in rows_of(tmp_path / "decisions.csv").items()}
    bundle, run = (rows_of(evaluations[name][0] / "predictions.csv") for name in ("bundle", "run"))
    assert predicted.keys() == bundle.keys() == run.keys()
    assert len(run) == 4
    for name, row in run.items():
        assert {**predicted[name], "file": name} == bundle[name]
        assert [row[column] for column in DECISIONS] == [bundle[name][column] for column in DECISIONS]
        for column in [column for column in row if column.startswith(("prob_", "p_"))]:
            assert float(row[column]) == pytest.approx(float(bundle[name][column]), abs=1.01e-4)


def test_evaluate_lists_what_it_cannot_read(
    exported: tuple[Path, Any], data_copy: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
    (data_copy / "test" / "ASD" / "broken.png").write_text("no image")
    (ran,) = warm([["evaluate", exported[0], data_copy, "--out", tmp_path / "out"]])
    assert (ran.code, len(ran.errors)) == (5, 1)
    assert ran.errors[0].startswith("test/ASD/broken.png: ")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))["unreadable"] == 1
