"""Training curves: the figure marks the epoch of the model and shades progressive epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from echoquad_train.plot_style import save
from echoquad_train.runs.history import Epoch
from echoquad_train.runs.training_curves import training_curves


@pytest.mark.parametrize("count", [1, 2, 20])
def test_figure_marks_the_epoch_of_the_model_and_shades_progressive_ones(tmp_path: Path, count: int) -> None:
    history = [Epoch(n, "all", 1e-3, 1 / n, 0.5, 1.2 / n, 0.4, 1 - 0.5 / n, 1.0) for n in range(1, count + 1)]
    figure = training_curves(history, history[-1])
    assert f"in epoch {count}" in figure.axes[1].get_legend().get_texts()[-1].get_text()
    save(figure, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert (image.format, image.size) == ("PNG", (1350, 570))
    assert not any(axes.patches for axes in figure.axes)
    for axes in training_curves(history, history[0], 12).axes:  # at most the epochs so far are shaded
        (shade,) = axes.patches
        assert shade.get_x() == 0.5 and shade.get_width() == min(count, 12)
        assert axes.get_legend().get_texts()[-1].get_text() == "smaller quadrants"
