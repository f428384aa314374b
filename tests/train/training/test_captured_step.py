"""Captured steps: a replay equals the eager step, or it is not used.

`Tape` replaces CUDA graphs and has their relevant semantics: fixed memory addresses and constant numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from echoquad_train.fitting import loop as fitting
from echoquad_train.fitting.loop import fit
from echoquad_train.parallel.ranks import ALONE, Ranks, Share
from echoquad_train.recipe import Recipe
from echoquad_train.training import captured_step
from echoquad_train.training.batches import TrainingBatch
from echoquad_train.training.captured_step import CapturedStep, CudaGraphRecorder, capture
from echoquad_train.training.optimizer_schedule import OptimizerSchedule, phase_of
from echoquad_train.training.train_step import step_recorder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
RECIPE = Recipe.load("scratch").replace(
    input_size=24, epochs=3, batch_size=8, mixed_precision=False, progressive_fraction=0.0
)


class Tape(TorchDispatchMode):
    """Records every operation with its arguments, and replays them into the memory of the recorded results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, tensors_of(out)))
        return out

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> None:
        with self:
            function()

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, results in self.operations:
                known = {value.untyped_storage().data_ptr() for value in tensors_of((args, kwargs))}
                for result, value in zip(results, tensors_of(func(*args, **kwargs)), strict=True):
                    if value.untyped_storage().data_ptr() not in known:  # neither modified in place nor a view
                        result.detach().copy_(value)

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Small:
    """A step of a small network with dropout and batch normalisation, with the arguments of `capture`."""

    def __init__(self, optimizer: str = "adamw", *, capturable: bool = True, where: torch.device = CPU) -> None:
        torch.manual_seed(0)
        self.where = where
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).to(where)
        recipe = RECIPE.replace(optimizer=optimizer, lr=0.01)
        groups = [{"params": list(self.model.parameters()), "lr": 0.01}]
        self.schedule = OptimizerSchedule(groups, recipe, phase_of(recipe, 1), 20, capturable=capturable)
        self.loss_sum = torch.zeros((), device=where)
        self.steps = 0

    def __call__(self, batch: TrainingBatch) -> None:
        logits = self.model(batch.quadrants.float().flatten(1) + batch.draws["shift"])
        loss = nn.functional.cross_entropy(logits, batch.labels, reduction="sum") / batch.weight
        self.schedule.apply_gradient(loss, NO_SCALER)
        self.loss_sum += loss.detach()

    def state(self) -> dict[str, list[Tensor]]:
        return {
            "weights": [weight.detach() for weight in self.model.parameters()],
            "batch statistics": list(self.model.buffers()),
            "loss": [self.loss_sum],
            "optimizer's state": self.schedule.state_tensors(),
        }

    def batch(self, seed: int) -> TrainingBatch:
        rng = np.random.default_rng(seed)
        return TrainingBatch(
            torch.from_numpy(rng.integers(0, 3, (6, 1, 2, 2), np.uint8)).to(self.where),
            torch.from_numpy(rng.integers(0, 2, 6)).to(self.where),
            torch.tensor(rng.uniform(5, 7), dtype=torch.float32).to(self.where),
            {"shift": torch.from_numpy(rng.normal(0, 1, (6, 1)).astype(np.float32)).to(self.where)},
            Share(0, 6, 6),
        )

    def captured(self, make_recorder: Callable[[], Any] = Tape) -> CapturedStep | None:
        self.schedule.advance()
        return capture(self, self.batch(0), self.state, self.schedule.rate_tensors, make_recorder)

    def everything(self) -> list[Tensor]:
        return [tensor.clone() for tensors in self.state().values() for tensor in tensors]


OPTIMIZERS = ["adamw", "adam", "momentum", "sgd"]  # and rmsprop, which torch captures only on CUDA


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replay_equals_eager_step(optimizer: str) -> None:
    """Step by step, with a changing learning rate and dropout."""
    recorded, plain = Small(optimizer), Small(optimizer)
    torch.manual_seed(4)
    captured = recorded.captured()
    assert captured is not None
    for seed in range(1, 6):
        captured(recorded.batch(seed))
        recorded.schedule.advance()
    torch.manual_seed(4)
    plain.schedule.advance()
    for seed in range(1, 6):
        plain(plain.batch(seed))
        plain.schedule.advance()
    assert plain.everything()
    assert all(torch.equal(a, b) for a, b in zip(recorded.everything(), plain.everything(), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("works", [False, True])
def test_capture_restores_state(optimizer: str, begun: bool, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With successful and failed verification, and with and without a state of the optimizer."""
    small = Small(optimizer)
    if begun:
        small.schedule.advance()
        small(small.batch(7))
    before, known = small.everything(), len(small.schedule.state_tensors())
    random_state = torch.get_rng_state()
    if not works:
        monkeypatch.setattr(captured_step, "_distance", lambda a, b: 1.0)
        monkeypatch.setattr(captured_step, "TOLERANCE", 0.5)
    small.schedule.advance()
    rates = [rate.clone() for rate in small.schedule.rate_tensors()]
    captured = capture(small, small.batch(0), small.state, small.schedule.rate_tensors, Tape)
    assert (captured is not None) == works
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a, b) for a, b in zip(small.schedule.rate_tensors(), rates, strict=True))
    after = small.everything()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=False))
    made = small.schedule.state_tensors()[known:]
    assert bool(made) == (not begun and optimizer != "sgd") and not any(value.any() for value in made)


@pytest.mark.parametrize("stale", [0, 1, 2, 3])
def test_stale_input_is_detected(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stale: int) -> None:
    """Quadrants, labels, weight or draws that the replay does not update: the recording is rejected."""
    complete = CapturedStep.__init__

    def forgetful(self: CapturedStep, recorder: Any, inputs: TrainingBatch) -> None:
        complete(self, recorder, inputs)
        self._inputs[stale] = self._inputs[stale].clone()

    monkeypatch.setattr(CapturedStep, "__init__", forgetful)
    assert Small().captured() is None
    assert "not captured in a CUDA graph: its replay changes the " in caplog.text


def test_constant_number_is_detected(caplog: pytest.LogCaptureFixture) -> None:
    """Learning rates that are numbers would keep the values of the first step."""
    small = Small(capturable=False)
    assert capture(small, small.batch(0), small.state, lambda: [], Tape) is not None  # without the changing scalars
    assert small.captured() is None
    assert "the learning rates are numbers" in caplog.text

    class Shifted(Small):
        def __call__(self, batch: TrainingBatch) -> None:
            self.steps += 1
            batch.draws["shift"].add_(self.steps)
            super().__call__(batch)

    assert Shifted().captured() is None


def waits(small: Small, batch: TrainingBatch) -> None:
    float(batch.weight)


class Refusing(Tape):
    """A recorder that fails, as when memory is short."""

    def record(self, function: Callable[[], None]) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def test_failed_capture_returns_none_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    small = Small()
    before = small.everything()
    assert capture(lambda batch: waits(small, batch), small.batch(0), small.state, lambda: [], Tape) is None
    assert small.captured(Refusing) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"training steps are not captured in a CUDA graph: {reason}; training continues without it, slower"
        for reason in ("operation not permitted when stream is capturing", "CUDA out of memory.")
    ]
    assert all(torch.equal(a, b) for a, b in zip(small.everything(), before, strict=False))


# Runs


def run(data: Path, folder: Path, reporter: Any, recipe: Recipe = RECIPE, **options: Any) -> bytes:
    fit(data, folder, recipe, **{"device": "cpu", "resume": False, "reporter": reporter, **options})
    return (folder / "best.safetensors").read_bytes()


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Capture the steps of every run on the CPU, and return the recorders."""
    made: list[Tape] = []

    def make() -> Tape:
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(fitting, "step_recorder", lambda *_: make)
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "batch_size": 6,
            "dropout": 0.5,
            "gamma": 0.1,
            "speckle": 0.1,
            "shadow": 0.5,
        },  # the last batch has 2 quadrants
        {
            "optimizer": "momentum",
            "lr": 1e-3,
            "ema_decay": 0.0,
            "context_padding": False,
            "schedule": "plateau",
            "model_epoch": "best",
        },
        {"trained_layers": "layer4", "warmup_epochs": 1, "epochs": 2},
    ],
)
def test_captured_run_equals_eager_run(
    tmp_path: Path,
    flat_data: Path,
    quiet: Any,
    thin: None,
    tapes: list[Tape],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    recipe = RECIPE.replace(**changes)
    recorded = run(flat_data, tmp_path / "recorded", quiet(), recipe)
    full, phases = 32 // recipe.batch_size, 1 + bool(recipe.warmup_epochs)
    # One replay of each recording is its verification.
    assert len(tapes) == phases and sum(tape.replays for tape in tapes) == recipe.epochs * full + phases
    monkeypatch.setattr(fitting, "step_recorder", lambda *_: Refusing)
    assert run(flat_data, tmp_path / "eager", quiet(), recipe) == recorded


def test_each_size_is_captured_separately(
    tmp_path: Path, flat_data: Path, quiet: Any, thin: None, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE.replace(input_size=80, progressive_fraction=0.7, progressive_scale=0.8)
    recorded = run(flat_data, tmp_path / "recorded", quiet(), recipe)
    assert [tape.replays for tape in tapes] == [9, 5]
    monkeypatch.setattr(fitting, "step_recorder", lambda *_: Refusing)
    assert run(flat_data, tmp_path / "eager", quiet(), recipe) == recorded


@pytest.mark.parametrize(("schedule", "model_epoch"), [("onecycle", "last"), ("plateau", "best")])
def test_captured_run_resumes_to_equal_result(
    tmp_path: Path, flat_data: Path, quiet: Any, thin: None, tapes: list[Tape], schedule: Any, model_epoch: Any
) -> None:
    recipe = RECIPE.replace(schedule=schedule, model_epoch=model_epoch, plateau_patience=0, dropout=0.5)

    def at_batch(epoch: int, done: int) -> None:
        if (epoch, done) == (3, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(flat_data, tmp_path / "run", quiet(at_batch=at_batch), recipe)
    torch.manual_seed(77)
    resumed = run(flat_data, tmp_path / "run", quiet(), recipe, resume=True)
    assert resumed == run(flat_data, tmp_path / "whole", quiet(), recipe) and len(tapes) == 3


def test_captured_distillation_equals_eager_run(
    tmp_path: Path, trained: Any, quiet: Any, thin: None, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = partial(run, trained.data, recipe=RECIPE.replace(center_crop=1.0, epochs=2), teacher=trained.folder)
    recorded = train(tmp_path / "recorded", quiet())
    assert tapes[0].replays == 9
    monkeypatch.setattr(fitting, "step_recorder", lambda *_: Refusing)
    assert train(tmp_path / "eager", quiet()) == recorded


def test_run_with_failed_capture_warns_once(
    tmp_path: Path,
    flat_data: Path,
    quiet: Any,
    thin: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fitting, "step_recorder", lambda *_: Refusing)
    run(flat_data, tmp_path / "run", quiet(), RECIPE.replace(trained_layers="layer4", warmup_epochs=1))
    assert len(caplog.records) == 1


def test_captured_run_may_resume_eagerly(
    tmp_path: Path, flat_data: Path, quiet: Any, thin: None, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from CUDA to the CPU and back."""

    for epoch, recorder in ((2, lambda *_: Tape), (3, lambda *_: None)):

        def at_batch(*now: int, killed: tuple[int, int] = (epoch, 2)) -> None:
            if now == killed:
                raise KeyboardInterrupt

        monkeypatch.setattr(fitting, "step_recorder", recorder)
        with pytest.raises(KeyboardInterrupt):
            run(flat_data, tmp_path / "run", quiet(at_batch=at_batch), resume=epoch > 2)
    monkeypatch.setattr(fitting, "step_recorder", lambda *_: Tape)
    run(flat_data, tmp_path / "run", quiet(), resume=True)


# Devices


@pytest.mark.parametrize(
    ("where", "ranks", "scaled", "switch", "recorded"),
    [
        (CUDA, ALONE, False, None, True),
        (CUDA, ALONE, False, "1", True),
        (CUDA, ALONE, False, "0", False),
        (CUDA, ALONE, True, None, False),
        (CUDA, Ranks(0, 2), False, None, False),
        (CPU, ALONE, False, None, False),
    ],
)
def test_steps_are_captured_only_on_single_cuda_process(
    monkeypatch: pytest.MonkeyPatch, where: torch.device, ranks: Ranks, scaled: bool, switch: str | None, recorded: bool
) -> None:
    monkeypatch.delenv("ECHOQUAD_CUDA_GRAPHS", raising=False)
    if switch is not None:
        monkeypatch.setenv("ECHOQUAD_CUDA_GRAPHS", switch)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    assert (step_recorder(where, ranks, scaler) is not None) == recorded


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "rmsprop"])
def test_cuda_graph_equals_eager_step(optimizer: str) -> None:
    recorded, plain = Small(optimizer, where=CUDA), Small(optimizer, where=CUDA)
    torch.manual_seed(4)
    captured = recorded.captured(lambda: CudaGraphRecorder(CUDA))
    assert captured is not None
    for seed in range(1, 6):
        captured(recorded.batch(seed))
        recorded.schedule.advance()
    torch.manual_seed(4)
    plain.schedule.advance()
    for seed in range(1, 6):
        plain(plain.batch(seed))
        plain.schedule.advance()
    for a, b in zip(recorded.everything(), plain.everything(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@gpu
def test_failed_cuda_capture_restores_cuda_state(caplog: pytest.LogCaptureFixture) -> None:
    """The eager step continues with the same dropout masks."""
    tried, plain = Small(where=CUDA), Small(where=CUDA)

    def impossible(batch: TrainingBatch) -> None:
        tried(batch)
        float(batch.weight)

    torch.manual_seed(4)
    recorder = partial(CudaGraphRecorder, CUDA)
    assert capture(impossible, tried.batch(0), tried.state, tried.schedule.rate_tensors, recorder) is None
    assert len(caplog.records) == 1
    for small in (tried, plain):
        torch.manual_seed(4)
        small.schedule.advance()
        small(small.batch(1))
    assert all(torch.equal(a, b) for a, b in zip(tried.everything(), plain.everything(), strict=True))


@pytest.mark.gpu
@gpu
def test_run_on_cuda_is_captured(
    tmp_path: Path,
    flat_data: Path,
    quiet: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a warning, and with the weights of an eager run up to rounding."""
    replays: list[int] = []
    replay = CudaGraphRecorder.replay
    monkeypatch.setattr(CudaGraphRecorder, "replay", lambda self: [replays.append(1), replay(self)])
    recipe = RECIPE.replace(input_size=32, lr=1e-3, epochs=2, batch_size=6)
    recorded = fit(flat_data, tmp_path / "a", recipe, device="cuda", resume=False, reporter=quiet())
    assert not caplog.records and len(replays) == 2 * 5 + 1
    monkeypatch.setenv("ECHOQUAD_CUDA_GRAPHS", "0")
    plain = fit(flat_data, tmp_path / "b", recipe, device="cuda", resume=False, reporter=quiet())
    assert len(replays) == 11
    for a, b in zip(recorded.history, plain.history, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-2)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("switch", ["0", "1"])
def test_no_step_on_cuda_synchronises(
    tmp_path: Path, flat_data: Path, quiet: Any, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    """Between the first step of an epoch and the end of the last step."""

    def at_batch(epoch: int, done: int) -> None:
        if epoch == 2:
            torch.cuda.set_sync_debug_mode("default" if done == 6 else "error")

    monkeypatch.setenv("ECHOQUAD_CUDA_GRAPHS", switch)
    recipe = RECIPE.replace(input_size=32, lr=1e-3, epochs=2, batch_size=6, mixed_precision=True, gamma=0.1)
    try:
        fit(flat_data, tmp_path / "run", recipe, device="cuda", resume=False, reporter=quiet(at_batch=at_batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
