"""Batches on the device: quadrants, labels and draws, resident on CUDA or copied, shared by ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echoquad_runtime.contract import QUADRANTS
from echoquad_train.data.dataset import QuadrantStore
from echoquad_train.fitting.loop import fit
from echoquad_train.parallel.ranks import Ranks
from echoquad_train.recipe import Recipe
from echoquad_train.training import batches as batching
from echoquad_train.training.augmentation import draw_augmentation
from echoquad_train.training.batches import BatchLoader, DeviceFeed, TrainingBatch, epoch_generator
from echoquad_train.training.sampling import draw_batches

CPU = torch.device("cpu")
RECIPE = Recipe.load("scratch").replace(
    batch_size=6, gamma=0.1, gain=0.1, attenuation=0.1, shadow=0.3, speckle=0.1, erase=0.5
)
WEIGHTS = torch.tensor([0.5, 1.5])


@pytest.fixture
def frames() -> QuadrantStore:
    labels = np.repeat([0, 1], [2, 3])
    quadrants = np.arange(20, dtype=np.uint8).reshape(5, 4, 1, 1) + np.zeros((5, 4, 8, 8), np.uint8)
    return QuadrantStore(quadrants, labels, ("",) * 5, ())


@pytest.fixture(params=["copied", "resident"])
def kept(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Copy quadrants batch by batch, or keep them resident on the device, here the CPU."""
    monkeypatch.setattr(batching, "_free_bytes", lambda where: 0 if request.param == "copied" else 2**30)
    return str(request.param)


def test_feed_yields_requested_quadrants(frames: QuadrantStore, kept: str) -> None:
    feed = DeviceFeed(frames, CPU)
    assert (feed.resident is not None) == (kept == "resident")
    batches = [np.array([0, 7, 19, 8]), np.array([3])]
    first, second = feed.feed(batches)
    assert first.shape == (4, 1, 8, 8) and first.dtype == torch.uint8
    assert first[:, 0, 0, 0].tolist() == [0, 7, 19, 8] and second[:, 0, 0, 0].tolist() == [3]
    whole, _ = feed.feed(batches, whole=True)
    assert whole[:, :, 0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [16, 17, 18, 19], [8, 9, 10, 11]]
    first.zero_(), whole.zero_()
    assert frames.quadrants.max() == 19  # the batch is a copy


def test_store_that_does_not_fit_is_copied(frames: QuadrantStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, resident in ((4 * frames.quadrants.nbytes, True), (4 * frames.quadrants.nbytes - 1, False)):
        monkeypatch.setattr(batching, "_free_bytes", lambda where, free=free: free)
        assert (DeviceFeed(frames, CPU).resident is not None) == resident


@pytest.mark.parametrize("wrong", [lambda quadrants: quadrants * 0, lambda quadrants: quadrants[::-1].copy()])
def test_wrong_resident_quadrants_are_detected(
    frames: QuadrantStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: Any
) -> None:
    monkeypatch.setattr(batching, "_free_bytes", lambda where: 2**30)
    monkeypatch.setattr(batching, "_upload", lambda quadrants, where: torch.from_numpy(wrong(quadrants)))
    feed = DeviceFeed(frames, CPU)
    assert feed.resident is None and "differ from those of the data set" in caplog.text
    assert next(feed.feed([np.array([19])])).unique().tolist() == [19]


def loaded(frames: QuadrantStore, recipe: Recipe = RECIPE, ranks: Ranks | None = None) -> list[TrainingBatch]:
    generator = torch.Generator().manual_seed(3)
    batches = list(draw_batches(frames, recipe, generator))
    loader = BatchLoader(recipe, frames, CPU, WEIGHTS, ranks or Ranks())
    return list(loader.epoch(batches, epoch_generator(CPU, generator, 9)))


@pytest.mark.parametrize("context_padding", [False, True])
def test_epoch_yields_batches_with_labels_weights_and_draws(
    frames: QuadrantStore, kept: str, context_padding: bool
) -> None:
    """On the CPU the draws of a batch follow those of the sampler and of the previous batch."""
    recipe = RECIPE.replace(context_padding=context_padding)
    generator = torch.Generator().manual_seed(3)
    batches = list(draw_batches(frames, recipe, generator))
    found = loaded(frames, recipe)
    assert [len(chosen) for chosen in batches] == [len(batch.labels) for batch in found] == [6, 6, 6, 2]
    for chosen, batch in zip(batches, found, strict=True):
        draws = draw_augmentation(len(chosen), 8, recipe, generator)
        assert batch.draws.keys() == draws.keys()
        assert all(torch.equal(batch.draws[name], values) for name, values in draws.items())
        labels = frames.labels[chosen // 4]
        assert batch.labels.tolist() == labels.tolist()
        assert float(batch.weight) == float(WEIGHTS[labels].sum())
        assert (batch.positions is None) == (not context_padding)
        if batch.positions is None:
            assert batch.quadrants[:, 0, 0, 0].tolist() == chosen.tolist()
        else:
            assert batch.positions.tolist() == (chosen % 4).tolist()
            assert batch.quadrants[:, 0, 0, 0].tolist() == (chosen // 4 * 4).tolist()


def test_positions_follow_the_quadrant_layout(frames: QuadrantStore) -> None:
    recipe = RECIPE.replace(context_padding=True)
    layout = ("RV", "LV", "RA", "LA")
    for one, other in zip(
        loaded(frames, recipe), loaded(frames, recipe.replace(quadrant_layout=",".join(layout))), strict=True
    ):
        assert one.positions is not None and other.positions is not None
        assert [QUADRANTS[index] for index in one.positions] == [layout[index] for index in other.positions]


@pytest.mark.parametrize("limit", [0, 7, 12, 1000])
def test_ranks_share_a_batch_and_its_draws(
    frames: QuadrantStore, kept: str, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """For any number of batches that are drawn at once."""
    monkeypatch.setattr(batching, "_drawn_at_once", lambda where: limit)
    alone = loaded(frames)
    apart = [loaded(frames, ranks=Ranks(rank, 3)) for rank in range(3)]
    for index, batch in enumerate(alone):
        parts = [batches[index] for batches in apart]
        assert float(sum(part.weight for part in parts)) == pytest.approx(float(batch.weight))
        for found, expected in zip(zip(*(part.tensors() for part in parts), strict=True), batch.tensors(), strict=True):
            if expected.ndim:
                assert torch.equal(torch.cat(found), expected)


def test_chunks_hold_as_many_batches_as_fit() -> None:
    sizes = [6, 6, 6, 2, 30, 1]
    parts = {limit: [sizes[part] for part in batching._chunks(sizes, limit)] for limit in (0, 12, 100)}
    assert parts == {0: [[6], [6], [6], [2], [30], [1]], 12: [[6, 6], [6, 2], [30], [1]], 100: [sizes]}
    assert batching._chunks([], 5) == []


def test_every_row_has_its_own_draws(frames: QuadrantStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_drawn_at_once", lambda where: 1000)
    warps = torch.cat([batch.draws["warp"] for batch in loaded(frames)])
    assert len({warp.numpy().tobytes() for warp in warps}) == 20


def test_preview_equals_first_batch(frames: QuadrantStore, kept: str) -> None:
    generator = torch.Generator().manual_seed(3)
    batches = list(draw_batches(frames, RECIPE, generator))
    loader = BatchLoader(RECIPE, frames, CPU, WEIGHTS)
    shown = loader.preview(batches, generator.clone_state())
    assert shown.shape == (6, 1, 8, 8) and shown.dtype == torch.float32
    other = loader.preview(batches, generator)
    assert torch.equal(shown, other) and not torch.equal(shown, loader.preview(batches, generator))


def test_zeros_have_their_own_memory(frames: QuadrantStore) -> None:
    batch = loaded(frames, RECIPE.replace(context_padding=True))[0]
    before = [value.clone() for value in batch.tensors()]
    zeros = batch.zeros()
    assert [value.shape for value in zeros.tensors()] == [value.shape for value in before]
    assert [value.dtype for value in zeros.tensors()] == [value.dtype for value in before]
    for value in zeros.tensors():
        assert not value.any()
        value.fill_(1)
    assert all(torch.equal(a, b) for a, b in zip(batch.tensors(), before, strict=True))


def test_run_with_resident_quadrants_equals_run(
    tmp_path: Path, trained: Any, quiet: Any, thin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_free_bytes", lambda where: 2**40)
    fit(trained.data, tmp_path / "run", trained.recipe, device="cpu", resume=False, reporter=quiet())
    assert (tmp_path / "run" / "best.safetensors").read_bytes() == (trained.folder / "best.safetensors").read_bytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_cuda_equal_cpu(frames: QuadrantStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """They equal those on the CPU except for the draws, which are reproducible."""
    cuda = torch.device("cuda")
    generator = torch.Generator().manual_seed(3)
    batches = list(draw_batches(frames, RECIPE, generator))

    def on(where: torch.device) -> list[TrainingBatch]:
        loader = BatchLoader(RECIPE, frames, where, WEIGHTS.to(where))
        return list(loader.epoch(batches, epoch_generator(where, generator.clone_state(), 9)))

    expected, resident = on(CPU), on(cuda)
    monkeypatch.setattr(batching, "_free_bytes", lambda where: 0)
    for found in (resident, on(cuda)):
        for a, b, again in zip(found, expected, resident, strict=True):
            for name in ("quadrants", "labels", "weight", "places"):
                assert getattr(a, name).device.type == "cuda" and torch.equal(getattr(a, name).cpu(), getattr(b, name))
            assert a.draws.keys() == b.draws.keys()
            assert all(torch.equal(values, again.draws[name]) for name, values in a.draws.items())
