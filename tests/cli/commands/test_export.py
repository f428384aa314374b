"""``echoquad export``: the bundle, a failed parity, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")


def test_export_prints_parity_and_writes_a_bundle(exported: tuple[Path, Any], left_in: Callable[..., Any]) -> None:
    folder, ran = exported
    lines = ran.out.splitlines()
    assert lines[0].split("  ")[0] == "precision"
    assert [line.split()[:2] for line in lines[2:]] == [["fp32", "1"], ["fp32", "2"], ["fp32", "5"], ["fp32", "16"]]
    assert all(line.split()[-2:] == ["0", "0"] for line in lines[2:])
    assert "parity passed on 4 validation frames" in ran.err
    assert ran.err.splitlines()[-1] == f"wrote {folder.as_posix()}/; next: echoquad predict {folder.as_posix()} INPUT"
    assert {path.name for path in folder.iterdir()} == {"bundle.json", "model.fp32.onnx", "golden.npz", "MODEL_CARD.md"}
    assert left_in(folder.parent) == []


@pytest.mark.slow
def test_export_for_triton_writes_bundle_and_model_repository(
    trained: tuple[Path, Any], warm: Callable[..., Any], left_in: Callable[..., Any], tmp_path: Path
) -> None:
    out, models = tmp_path / "bundle", tmp_path / "models"
    (models / "other").mkdir(parents=True)
    (models / "other" / "notes.txt").write_text("")
    written, refused = warm(
        [
            ["export", trained[0], "--out", out, "--triton", models],
            ["export", trained[0], "--out", tmp_path / "other", "--triton", models],
        ]
    )
    assert written.code == 0
    assert (models / "bundle" / "1" / "model.onnx").read_bytes() == (out / "frame.fp32.onnx").read_bytes()
    assert "golden frames as predict does" in written.err
    assert written.out.splitlines()[-1].endswith(f"next: tritonserver --model-repository={models.as_posix()}")
    # What cannot be written is refused before the export.
    assert (refused.code, refused.error[0], refused.out) == (1, "E_OUTPUT", "")
    assert not (tmp_path / "other").exists() and left_in(tmp_path) == []


# An existing graph takes the place of the slow export; the gate allows no difference at all.
STRICT = """
from pathlib import Path
from echoquad_export.packing import exporter
from echoquad_export.parity import parity
graph, build_graph, gates = Path({graph!r}).read_bytes(), exporter.build_graph, parity.GATES
exporter.build_graph = lambda model, contract, typicality: graph
parity.GATES = {{"fp32": parity.Gate(-1.0, 1e-4, 0.0, 0.0)}}
"""
RESTORE = "exporter.build_graph, parity.GATES = build_graph, gates"


def test_failed_parity_exits_3_and_keeps_the_older_bundle(
    trained: tuple[Path, Any],
    exported: tuple[Path, Any],
    warm: Callable[..., Any],
    left_in: Callable[..., Any],
    tmp_path: Path,
) -> None:
    older = Path(shutil.copytree(exported[0], tmp_path / "bundle"))
    before = {path.name: path.read_bytes() for path in older.iterdir()}
    strict = STRICT.format(graph=str(exported[0] / "model.fp32.onnx"))
    (ran,) = warm([["python", strict], ["export", trained[0], "--out", older], ["python", RESTORE]])
    assert (ran.code, ran.out) == (3, "")
    code, message = ran.error
    assert code == "E_PARITY" and "fp32" in message and "4 frames" in message and "|dlogit| " in message
    assert {path.name: path.read_bytes() for path in older.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert left_in(tmp_path) == []


def test_invalid_exports_and_evaluations_write_nothing(
    trained: tuple[Path, Any], data: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
    run, out = trained[0], tmp_path / "bundle"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    refusals = [
        ("E_USAGE", ["export", run, "--out", out, "--precision", "fp8"], "fp8"),
        ("E_USAGE", ["export", run, "--out", out, "--precision", ","], "fp32, fp16, int8"),
        ("E_USAGE", ["export", run, "--out", out, "--calibrate", data], "--calibrate"),
        ("E_RUN", ["export", tmp_path / "none", "--out", out], "run.json"),
        ("E_RUN", ["export", tmp_path / "run", "--out", out], "run.json"),
        ("E_RUN", ["export", data, "--out", out], "run.json"),
        ("E_OUTPUT", ["export", run, "--out", tmp_path / "full"], "full: "),
        ("E_DATASET", ["export", run, "--out", out, "--parity", tmp_path / "none"], "no such folder"),
        ("E_RUN", ["evaluate", tmp_path / "none", data, "--out", out], "none: no such folder"),
        ("E_RUN", ["evaluate", tmp_path / "full", data, "--out", out], "full: "),
        ("E_USAGE", ["evaluate", run, data, "--out", out, "--precision", "fp16"], "--precision fp16: "),
        ("E_DATASET", ["evaluate", run, tmp_path / "none", "--out", out], "none: no such folder"),
        ("E_DATASET", ["evaluate", run, data, "--out", out, "--split", "rest"], "rest/"),
        ("E_OUTPUT", ["evaluate", run, data, "--out", tmp_path / "full" / "thesis.tex"], "thesis.tex"),
    ]
    found = warm([line for _, line, _ in refusals])
    for (code, line, words), ran in zip(refusals, found, strict=True):
        assert (ran.code, ran.out, ran.error_codes) == (2 if code == "E_USAGE" else 1, "", [code]), (line, ran)
        assert words in ran.errors[0], line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "run", "run.json", "thesis.tex"]
