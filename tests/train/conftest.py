"""Fixtures of the training tests: labelled flat frames, a network a hundred times smaller, a trained run."""

# ruff: noqa: E402

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")  # without torch, pytest skips this folder

import torchvision
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from echoquad_runtime.contract import Contract
from echoquad_train.curation.leaks import Leaks
from echoquad_train.data.dataset import Split
from echoquad_train.fitting.loop import FitResult, fit
from echoquad_train.recipe import Recipe
from echoquad_train.runs import run_metadata as record
from echoquad_train.runs.history import Epoch

TINY = Recipe(
    weights="none",
    input_size=16,
    center_crop=1.0,
    epochs=3,
    batch_size=8,
    warmup_epochs=0,
    trained_layers="all",
    lr=3e-3,
    early_stopping_patience=0,
    dropout=0.1,
    mixed_precision=False,
)


# The networks are tiny: several threads take longer, above all beside other processes. With two threads, oneDNN
# (torch 2.14) also writes out of bounds in the backward pass of channels-last convolutions as thin as these with an odd
# number of samples.
torch.set_num_threads(1)


class ThinResNet(ResNet):
    """A ResNet with the standard layer names, one block in each layer and an eighth of the channels."""

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // 8, blocks, stride, dilate)


def thin_backbone(name: str, weights: object = None) -> ResNet:
    assert weights is None
    body = ThinResNet(BasicBlock, [1, 1, 1, 1])
    body.fc = nn.Linear(64, 1000)
    return body


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip what is slow and not under test: drawing training curves and waiting for the disk."""
    monkeypatch.setattr(record, "training_curves", lambda history, chosen, progressive_epochs: b"")
    monkeypatch.setattr(record, "save", lambda figure, path: path.write_bytes(figure))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def thin(swift: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every backbone by the thin one, with the shortcuts of `swift`."""
    monkeypatch.setattr(torchvision.models, "get_model", thin_backbone)


@contextmanager
def thin_backbones() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "get_model", thin_backbone)
        yield


@pytest.fixture(scope="session")
def thin_session() -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which every backbone is the thin one, for fixtures of a wider scope."""
    return thin_backbones


def write_frames(
    data: Path,
    classes: Sequence[str] = ("bright", "dark"),
    frames: int = 3,
    splits: Sequence[str] = ("train", "validation"),
    noise: float = 25.0,
) -> Path:
    """Write DATA/SPLIT/CLASS/*.png: frames whose grey level encodes the class, with noise."""
    rng = np.random.default_rng(5)
    for split in splits:
        for index, name in enumerate(classes):
            folder = data / split / name
            folder.mkdir(parents=True, exist_ok=True)
            level = 230 - 200 * index / max(1, len(classes) - 1)
            for number in range(frames):
                pixels = level + rng.normal(0, noise, (40 + number % 3, 48))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{split}{number}.png")
    return data


@pytest.fixture(scope="session")
def make_data() -> Callable[..., Path]:
    """Return `write_frames`."""
    return write_frames


@dataclass
class Quiet:
    """A reporter that stores its events and calls hooks, in which a test may raise."""

    device: str = ""
    precision: str = ""
    leaks: Leaks | None = None
    decoded: list[tuple[str, int, int]] = field(default_factory=list)
    batches: list[tuple[int, int, int]] = field(default_factory=list)
    epochs: list[tuple[Epoch, bool]] = field(default_factory=list)
    at_decoding: Callable[[str, int], None] = lambda split, done: None
    at_batch: Callable[[int, int], None] = lambda epoch, done: None

    def decoding(self, split: str, done: int, total: int) -> None:
        self.decoded.append((split, done, total))
        self.at_decoding(split, done)

    def started(self, device: str, precision: str, train: Split, validation: Split) -> None:
        self.device, self.precision = device, precision

    def audited(self, leaks: Leaks) -> None:
        self.leaks = leaks

    def batch(self, epoch: int, done: int, total: int) -> None:
        self.batches.append((epoch, done, total))
        self.at_batch(epoch, done)

    def epoch(self, epoch: Epoch, epochs: int, best: bool) -> None:
        self.epochs.append((epoch, best))


@pytest.fixture(scope="session")
def quiet() -> type[Quiet]:
    """Return `Quiet`, the reporter."""
    return Quiet


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    """Return a recipe that trains on flat frames in a second."""
    return TINY


@pytest.fixture(scope="session")
def flat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write labelled flat frames of the classes bright and dark in all three splits. Shared: do not modify."""
    return write_frames(tmp_path_factory.mktemp("flat") / "data", frames=4, splits=("train", "validation", "test"))


@dataclass(frozen=True)
class Trained:
    """A finished run and what it was trained on."""

    data: Path
    folder: Path
    recipe: Recipe
    fitted: FitResult
    reporter: Quiet

    @property
    def info(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, flat_data: Path) -> Trained:
    """Train a run of the thin network. Shared: do not modify."""
    folder, reporter = tmp_path_factory.mktemp("trained") / "run", Quiet()
    with thin_backbones():
        fitted = fit(flat_data, folder, TINY, device="cpu", resume=False, reporter=reporter)
    return Trained(flat_data, folder, TINY, fitted, reporter)


class Brightness:
    """An engine whose probability of `bright` is the brightness of a quadrant."""

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
def brightness_engine() -> type[Brightness]:
    """Return an engine whose answers are known; call it with a contract."""
    return Brightness
