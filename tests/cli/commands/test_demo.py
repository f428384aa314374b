"""``echoquad demo``: every step on phantoms, and folders that it must not replace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_demo_refuses_a_folder_that_is_not_a_demo(many: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    file.write_text("text")
    found, modules = many([["demo", "--out", full], ["demo", "--out", file]])
    for place, ran in zip((full, file), found, strict=True):
        assert (ran.code, ran.out) == (1, "")
        code, message = ran.error
        assert code == "E_OUTPUT" and message.startswith(f"{place.as_posix()}: ") and "--out" in message
    assert (full / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]
    assert "torch" not in modules


@pytest.mark.slow
def test_demo_runs_every_step_and_replaces_an_older_demo(
    echoquad: Callable[..., Any], left_in: Any, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "demo"
    for _ in range(2):
        ran = echoquad("demo", "--out", out, "--patients", "10", "--epochs", "1")
        steps = [line.split()[2] for line in ran.err.splitlines() if line.startswith("$ echoquad ")]
        assert steps == ["data", "train", "evaluate", "export", "verify", "predict", "bench"]
        assert "PASS " in ran.out
        shown = [line.strip() for line in ran.err.partition("What to look at:")[2].splitlines()]
        for path in ("data/", "run/curves.png", "evaluation/report.html", "bundle/MODEL_CARD.md", "bench.json"):
            assert f"{out.as_posix()}/{path}" in shown
            assert (out / path).exists()
        overlays = [Path(line) for line in shown if line.endswith(".overlay.png")]
        assert len(overlays) == 1
        assert overlays[0].is_file()
        frames = json.loads((out / "evaluation" / "metrics.json").read_text("utf-8"))["frames"]
        assert len((out / "predictions.csv").read_text("utf-8").splitlines()) == frames + 1
        assert left_in(out) == [".echoquad-demo"]
        assert "Research use only." in ran.err
