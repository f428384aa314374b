"""TensorBoard: event files contain the run's figures exactly once, also after a kill and a resume."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import OutputError
from echoquad_train.fitting.loop import fit
from echoquad_train.runs import checkpoint
from echoquad_train.runs.tensorboard_writer import TENSORBOARD

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / TENSORBOARD), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory, trained: Any, quiet: Any, thin_session: Any) -> dict[str, Path]:
    """Train an uninterrupted run, and one that is killed at the end of its second epoch and resumed.

    At the kill the figures of that epoch are written, but not its state, so the epoch is repeated.
    """
    folder = tmp_path_factory.mktemp("boards")

    save = checkpoint.save_last

    def killed(run: Path, state: Any) -> None:
        if len(state["history"]) == 2:
            raise KeyboardInterrupt
        save(run, state)

    def train(name: str, resume: bool) -> None:
        run = folder / name
        fit(trained.data, run, trained.recipe, device="cpu", resume=resume, reporter=quiet(), tensorboard=True)

    with thin_session():
        train("whole", False)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, "save_last", killed)
            train("killed", False)
        train("killed", True)
    return {name: folder / name for name in ("whole", "killed")}


@pytest.mark.parametrize("name", ["whole", "killed"])
def test_event_file_contains_history(boards: dict[str, Path], trained: Any, name: str) -> None:
    found = read(boards[name])
    fields = {
        "loss/train": "train_loss",
        "loss/validation": "validation_loss",
        "accuracy/train quadrants": "train_patch_accuracy",
        "accuracy/validation quadrants": "validation_patch_accuracy",
        "accuracy/validation frames": "validation_frame_accuracy",
        "learning rate": "lr",
    }
    corners = [f"quadrant/{corner}" for corner in ("LA", "RA", "LV", "RV")]
    assert set(found.Tags()["scalars"]) == {*fields, *corners, "seconds"}
    for tag, field in fields.items():
        events = found.Scalars(tag)
        assert [event.step for event in events] == [1, 2, 3], tag
        np.testing.assert_allclose(
            [event.value for event in events], [getattr(epoch, field) for epoch in trained.fitted.history], rtol=1e-6
        )
    means = np.mean([[event.value for event in found.Scalars(corner)] for corner in corners], axis=0)
    np.testing.assert_allclose(means, [epoch.validation_patch_accuracy for epoch in trained.fitted.history], rtol=1e-6)


def test_augmented_batch_is_written_once(boards: dict[str, Path], trained: Any) -> None:
    """Eight quadrants of 16 pixels with a border of 2 around each."""
    (event,) = read(boards["killed"]).Images("augmented quadrants")
    assert event.step == 1
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
    assert picture.shape == (20, 8 * 18 + 2)
    tiles = [picture[2:18, 2 + 18 * i : 18 + 18 * i] for i in range(8)]
    assert len({tile.tobytes() for tile in tiles}) == 8 and all(tile.std() > 0 for tile in tiles)


def test_tensorboard_does_not_change_run(boards: dict[str, Path], trained: Any) -> None:
    for folder in boards.values():
        assert (folder / "best.safetensors").read_bytes() == (trained.folder / "best.safetensors").read_bytes()
        assert {path.name for path in folder.iterdir()} == {path.name for path in trained.folder.iterdir()} | {
            TENSORBOARD
        }


def test_unwritable_tensorboard_folder_is_one_line(tmp_path: Path, trained: Any, quiet: Any, thin: None) -> None:
    def block(split: str, done: int) -> None:
        (tmp_path / "run" / TENSORBOARD).write_text("a file in the folder's place")

    reporter = quiet(at_decoding=block)
    with pytest.raises(OutputError, match=r"run/tensorboard: cannot be written \("):
        fit(
            trained.data,
            tmp_path / "run",
            trained.recipe,
            device="cpu",
            resume=False,
            reporter=reporter,
            tensorboard=True,
        )
