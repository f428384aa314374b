"""Score figures and saving them: labels, sizes, and an interrupted save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_train.evaluation.frame_metrics import roc_curves
from echoquad_train.evaluation.scored_frames import ScoredFrames
from echoquad_train.plot_style import save
from echoquad_train.reporting import score_figures


def png_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


@pytest.mark.parametrize("count", [2, 5, 12])
def test_confusion_matrix_figure_shows_counts_and_fractions(tmp_path: Path, count: int) -> None:
    matrix = np.arange(count * count).reshape(count, count)
    matrix[0] = 0  # a class without frames
    classes = [f"class {index}" for index in range(count)]
    figure = score_figures.confusion_matrix(matrix, classes, "test: accuracy")
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts[0] == "0\n0.0%" and texts[count] == f"{count}\n{count / matrix[1].sum():.1%}"
    assert [label.get_text() for label in axes.get_yticklabels()] == classes
    assert axes.get_xlabel() == "decided" and axes.get_ylabel() == "true"
    save(figure, tmp_path / "confusion.png")
    width, height = png_size(tmp_path / "confusion.png")
    assert 600 < width < 2200 and 600 < height < 2200


def test_roc_figure_has_a_distinct_line_per_class(tmp_path: Path) -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(9), (60, 4))
    names, labels = tuple(f"{index}.png" for index in range(60)), np.arange(60) % 9
    decided = p.mean(axis=1).argmax(axis=1)
    scored = ScoredFrames(names, tuple("abcdefghi"), "a", "average", (1.0, 1.0, 1.0, 1.0), labels, p, decided, names)
    for curve in (roc_curves(scored), []):
        figure = score_figures.roc(curve, "test: 60 frames")
        lines = figure.axes[0].lines
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 1 + len(curve)
        save(figure, tmp_path / "roc.png")
        width, height = png_size(tmp_path / "roc.png")
        assert width == 960 and 900 <= height < 1300


def test_interrupted_save_keeps_the_old_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "roc.png"
    path.write_bytes(b"old")
    figure = score_figures.roc([], "x")

    def broken(stream: Any, **_: Any) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", broken)
    with pytest.raises(KeyboardInterrupt):
        save(figure, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
