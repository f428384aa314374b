"""Fixtures of the export tests: a data set with names that must not leak, a run trained on it, and its bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("onnx")

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from echoquad_export.graph.build import build_graph
from echoquad_export.packing.exporter import Exported, export_run
from echoquad_export.parity import golden
from echoquad_runtime.contract import Contract
from echoquad_train.fitting.loop import fit
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.recipe import Recipe

PATIENT = "DOE-JANE-19600213"


class ThinResNet(ResNet):
    """A ResNet with one block per layer and an eighth of the channels."""

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // 8, blocks, stride, dilate)


def thin_backbone(name: str, weights: object = None) -> ResNet:
    body = ThinResNet(BasicBlock, [1, 1, 1, 1])
    body.fc = nn.Linear(64, 1000)
    return body


@contextmanager
def thin_backbones() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "get_model", thin_backbone)
        yield


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every backbone by the thin one, and skip waiting for the disk."""
    monkeypatch.setattr(torchvision.models, "get_model", thin_backbone)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def thin_model(thin: None) -> Callable[[Contract], QuadrantClassifier]:
    """Return a maker of thin classifiers with batch statistics of noise, so that their answers vary."""

    def make(contract: Contract) -> QuadrantClassifier:
        torch.manual_seed(3)
        model = QuadrantClassifier("resnet18", contract, dropout=0.5).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # cumulative mean
        size = contract.input_size
        with torch.no_grad():
            for _ in range(3):
                model(torch.randint(0, 256, (16, 1, size, size)))
        return model.eval()

    return make


_GRAPHS: dict[str, bytes] = {}


@pytest.fixture
def thin_graph(thin_model: Callable[[Contract], QuadrantClassifier]) -> Callable[[Contract], bytes]:
    """Return a maker of the exported graphs of `thin_model`; each is built once per session."""

    def make(contract: Contract) -> bytes:
        if contract.sha256 not in _GRAPHS:
            _GRAPHS[contract.sha256] = build_graph(thin_model(contract), contract)
        return _GRAPHS[contract.sha256]

    return make


@pytest.fixture
def few_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a small pool of golden frames, for tests that do not depend on it."""
    monkeypatch.setattr(golden, "POOL", 6)


class Silent:
    """A reporter that ignores all calls."""

    def decoding(self, *_: object) -> None: ...
    def started(self, *_: object) -> None: ...
    def audited(self, *_: object) -> None: ...
    def batch(self, *_: object) -> None: ...
    def epoch(self, *_: object) -> None: ...


def write_frames(data: Path, classes: tuple[str, ...], frames: int = 4) -> Path:
    rng = np.random.default_rng(9)
    for split in ("train", "validation"):
        for index, name in enumerate(classes):
            folder = data / split / name / PATIENT
            folder.mkdir(parents=True)
            for number in range(frames):
                level = 220 - 190 * index / (len(classes) - 1)
                pixels = level + rng.normal(0, 40, (50 + number, 61)).cumsum(axis=0) / 4
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{PATIENT}-{number}.png")
    return data


@dataclass(frozen=True)
class Case:
    """A run, the data it was trained on, and the bundle made of it."""

    data: Path
    run: Path
    bundle: Path
    exported: Exported


def make_case(root: Path, classes: tuple[str, ...], recipe: Recipe) -> Case:
    data = write_frames(root / f"scans of {PATIENT}", classes)
    with thin_backbones():
        fit(data, root / "run", recipe, device="cpu", resume=False, reporter=Silent())
        exported = export_run(root / "run", root / "bundle")
    return Case(data, root / "run", root / "bundle", exported)


RECIPE = Recipe(
    weights="none",
    input_size=24,
    epochs=2,
    batch_size=8,
    warmup_epochs=0,
    trained_layers="all",
    lr=3e-3,
    early_stopping_patience=0,
    mixed_precision=False,
)


@pytest.fixture(scope="session")
def case(make_once: Any) -> Case:
    """A run with the contract of the reference pipeline, and its bundle. Shared: tests must not change it."""
    return make_once("reference_case", lambda folder: make_case(folder, ("ASD", "NORM"), RECIPE))


@pytest.fixture(scope="session")
def other_case(make_once: Any) -> Case:
    """The same with nothing at its default: three classes, another crop, normalisation and vote."""
    changes = {"center_crop": 0.7, "mean": 0.3, "std": 0.21, "positive": "VSD", "vote": "weighted"}
    recipe = replace(RECIPE, vote_weights=(0.0, 1.0, 2.0, 3.5), **changes)
    return make_once("other_case", lambda folder: make_case(folder, ("ASD", "NORM", "VSD"), recipe))


@pytest.fixture
def run(case: Case, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(case.run, tmp_path / "run"))
