"""Fitting: from a data folder and a recipe to a run folder. Reads from top to bottom.

Every epoch seeds its own draws from the run's seed and its number, so a run that was killed and resumed goes through
the same batches as one that was not, and no generator's state has to be kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import RunError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.storage.atomic import make_folder, write_bytes
from echoquad_train.curation.leaks import Leaks, leaks_of_stores
from echoquad_train.data.dataset import Split, read_classes, read_split
from echoquad_train.data.patients import patient_pattern
from echoquad_train.data.stream import Storage, Stream
from echoquad_train.fitting.resume import abandoned_on_failure, begun, open_folder, require_same_teacher
from echoquad_train.networks.classifier import build_model
from echoquad_train.networks.device import Device, choose_device, make_deterministic, mixed_dtype
from echoquad_train.parallel.ranks import ALONE, Ranks
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint
from echoquad_train.runs import run_metadata as record
from echoquad_train.runs.background_writer import BackgroundWriter
from echoquad_train.runs.history import Epoch, best_of, out_of_patience
from echoquad_train.runs.tensorboard_writer import TensorboardWriter
from echoquad_train.training import optimizer_schedule as schedule
from echoquad_train.training.batches import DeviceFeed, epoch_generator
from echoquad_train.training.distillation import load_teacher, teacher_quadrants
from echoquad_train.training.ema_weights import EmaWeights
from echoquad_train.training.run_calibration import calibrate_run
from echoquad_train.training.sampling import class_weights, draw_batches, seed_of
from echoquad_train.training.train_step import Distillation, Trainer, recorder_of
from echoquad_train.training.validation import validate

__all__ = ["Fitted", "Reporter", "fit"]


class Reporter(Protocol):
    """Hears of the progress."""

    def decoding(self, split: str, done: int, total: int) -> None:
        """Hear that a frame was decoded."""

    def started(self, device: str, precision: str, train: Split, validation: Split) -> None:
        """Hear what will be trained, on what."""

    def audited(self, leaks: Leaks) -> None:
        """Hear what is in both splits."""

    def batch(self, epoch: int, done: int, total: int) -> None:
        """Hear that a batch is done."""

    def epoch(self, epoch: Epoch, epochs: int, best: bool) -> None:
        """Hear of a finished epoch."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A finished run: its folder, its epochs, the best of them, the frames that could not be read, its calibration."""

    folder: Path
    history: tuple[Epoch, ...]
    best: Epoch
    failures: tuple[Failure, ...]
    calibration: dict[str, Any] | None = None


class _Silent:
    """Stands for the reporter on the ranks that report nothing."""

    def decoding(self, split: str, done: int, total: int) -> None: ...

    def started(self, device: str, precision: str, train: Split, validation: Split) -> None: ...

    def audited(self, leaks: Leaks) -> None: ...

    def batch(self, epoch: int, done: int, total: int) -> None: ...

    def epoch(self, epoch: Epoch, epochs: int, best: bool) -> None: ...


def fit(
    data: Path,
    folder: Path,
    recipe: Recipe,
    *,
    device: Device = "auto",
    resume: bool,
    reporter: Reporter,
    teacher: Path | None = None,
    stream: Stream = "auto",
    workers: int | None = None,
    tensorboard: bool = False,
    ranks: Ranks = ALONE,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
    patient_regex: str | None = None,
    splits: tuple[Split, Split] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Fitted:
    """Train a classifier.

    Parameters
    ----------
    data
        ``DATA/{train,validation}/CLASS/**``.
    folder
        The run folder; made where it is not there.
    recipe
        How to train.
    device
        ``auto``, ``cpu`` or ``cuda``.
    resume
        Go on with the run that `folder` holds, which must be of the same recipe and data.
    reporter
        Hears of the progress.
    teacher
        A finished run to distil from; a resumed run needs the one that it was begun with.
    stream, workers
        Where quadrants are kept, and how many processes decode what is not; see `echoquad_train.data.stream.Storage`.
        The result does not depend on them.
    tensorboard
        Write event files as well; see `echoquad_train.runs.tensorboard_writer`.
    ranks
        The processes that train together, from `echoquad_train.parallel.ranks.joined`; each calls this function alike.
    reading
        How the data's files are read.
    patient_regex
        Says whom a frame is of, see `echoquad_train.data.patients.patient_of`; a resumed run knows it where it is
        not given.
    splits
        What to train and to validate on instead of `data`'s own splits, of the same classes: a fold.
    about
        What else ``run.json`` shall say.

    Raises
    ------
    DatasetError, ConfigError, RunError, DeviceUnavailableError, OutputError
        If the data, the recipe, the run folder, the device or the disk stand in the way.
    """
    where = choose_device(device)
    make_deterministic(where)
    with ExitStack() as opened:
        storage = opened.enter_context(Storage(folder, stream, workers))
        heard = reporter if ranks.first else _Silent()

        def board(done: int) -> TensorboardWriter | None:
            return opened.enter_context(TensorboardWriter(folder, done)) if tensorboard and ranks.first else None

        # On CUDA the next epoch trains while the files of this one are written.
        writer = opened.enter_context(BackgroundWriter(background=where.type == "cuda"))
        return _fit(
            data,
            reading,
            folder,
            recipe,
            where,
            resume,
            heard,
            teacher,
            storage,
            board,
            writer,
            ranks,
            patient_regex,
            splits,
            about,
        )


def _fit(
    data: Path,
    reading: ReadOptions,
    folder: Path,
    recipe: Recipe,
    where: torch.device,
    resume: bool,
    reporter: Reporter,
    teacher_folder: Path | None,
    storage: Storage,
    open_board: Callable[[int], TensorboardWriter | None],
    writer: BackgroundWriter,
    ranks: Ranks,
    patient_regex: str | None,
    splits: tuple[Split, Split] | None,
    about: Mapping[str, Any] | None,
) -> Fitted:
    state = ranks.from_first(lambda: open_folder(folder, recipe, resume))
    patient_regex = begun(folder, "patient_regex") if resume and patient_regex is None else patient_regex
    pattern = patient_pattern(patient_regex)
    classes = read_classes(data)
    contract = recipe.contract(classes)
    train, validation = splits or (read_split(data, split, classes, reading) for split in ("train", "validation"))
    fingerprints = [train.fingerprint, validation.fingerprint]
    if state and state["data"] != fingerprints:
        raise RunError(f"{folder.as_posix()}: the data has changed since the run was begun; train into another folder")
    teacher = load_teacher(teacher_folder, contract, where) if teacher_folder else None
    ranks.from_first(lambda: require_same_teacher(folder, state, teacher, resume=resume))
    torch.manual_seed(recipe.seed)
    # A resumed run has weights of its own: it needs neither the network nor the file that it once began from.
    begin = recipe.replace(weights="none") if state else recipe
    model = build_model(begin, contract).to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    make_folder(folder)
    if ranks.first:
        write_bytes(folder / checkpoint.RECIPE, recipe.to_toml().encode())

    # Every frame is decoded once, to 8-bit quadrants, and no epoch opens a file again; but for what is streamed.
    with abandoned_on_failure(folder, unless=resume or not ranks.first):
        train_store, validation_store = (
            storage.open(split, contract, partial(reporter.decoding, split.name)) for split in (train, validation)
        )
        progress = partial(reporter.decoding, f"{train.name} for the teacher")
        taught_store = teacher_quadrants(teacher, train, train_store, storage, progress) if teacher else train_store
    failures = (*train_store.failures, *validation_store.failures)

    dtype = mixed_dtype(recipe, recipe.backbone, recipe.input_size, where)
    precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    teacher_facts = teacher.facts if teacher else None
    both = train, validation
    facts = record.facts(data, recipe, contract, both, failures, where.type, precision, teacher_facts, reading)
    small = schedule.progressive_epochs(recipe)
    facts |= {**({"progressive_epochs": small} if small else {}), **(about or {})}
    if resume:
        facts["created"] = begun(folder, "created") or facts["created"]
    reporter.started(where.type, precision, train, validation)
    if ranks.first:
        leaks = leaks_of_stores((train_store, validation_store), pattern)
        facts |= {"patient_regex": patient_regex, "audit": leaks.counts}
        reporter.audited(leaks)

    # Training state: what a resumed run finds again.
    history = [Epoch(**row) for row in state["history"]] if state else []
    scaler = torch.amp.GradScaler(where.type, enabled=dtype is torch.float16)
    phase: schedule.Phase | None = None
    optimizer_schedule: schedule.OptimizerSchedule | None = None
    if state:
        model.load_state_dict(state["model"])
        if state["scaler"]:  # empty where the run was not in float16 before
            scaler.load_state_dict(state["scaler"])
    if ranks.first:
        record.write(folder, facts, history, finished=False)
    board = open_board(len(history))
    weights = class_weights(train_store.labels, len(classes)) if recipe.class_weights else torch.ones(len(classes))
    distillation = None
    if teacher:
        size = teacher.contract.input_size
        distillation = Distillation(teacher, taught_store, mixed_dtype(recipe, teacher.model.name, size, where))
    recorder = recorder_of(where, ranks, scaler)
    capturable = recorder is not None
    ema = EmaWeights(model, recipe.ema_decay, capturable=capturable) if recipe.ema_decay else None
    if ema and state:
        ema.load_state_dict(state["average"])
    kept = ema.model if ema else model  # whose weights are validated and kept
    trainer = Trainer(
        model, recipe, train_store, where, dtype, scaler, weights.to(where), distillation, ema, ranks, recorder
    )

    validation_feed = DeviceFeed(validation_store, where)

    for number in range(len(history) + 1, recipe.epochs + 1):
        if out_of_patience(history, recipe):
            break
        started = time.perf_counter()
        torch.manual_seed(seed_of(recipe.seed, number, 0))  # dropout's draws
        generator = torch.Generator().manual_seed(seed_of(recipe.seed, number, 1))
        batches = list(draw_batches(train_store, recipe, generator))
        augmenting = epoch_generator(where, generator, seed_of(recipe.seed, number, 2))

        # A phase trains the layers it names with an optimizer of its own.
        before, phase = phase, schedule.phase_of(recipe, number)
        groups = trainer.train_layers(phase.layers)
        if optimizer_schedule is None or phase != before:
            optimizer_schedule = schedule.OptimizerSchedule(groups, recipe, phase, len(batches), capturable=capturable)
            if state and history and phase == schedule.phase_of(recipe, len(history)):
                optimizer_schedule.load_state_dict(state["course"])
        state = None

        if board and not history:
            board.batch(trainer.loader.preview(batches, augmenting.clone_state()).cpu())
        side = schedule.side_of(recipe, number)
        steps = trainer.epoch(batches, augmenting, optimizer_schedule, partial(reporter.batch, number), side)
        validated = validate(kept, contract, validation_feed, ranks)
        epoch = Epoch(
            epoch=number,
            phase=phase.name,
            lr=steps.rate,
            train_loss=steps.loss,
            train_patch_accuracy=steps.accuracy,
            seconds=round(time.perf_counter() - started, 2),
            validation_loss=validated.loss,
            validation_patch_accuracy=validated.patch_accuracy,
            validation_frame_accuracy=validated.frame_accuracy,
        )
        if not math.isfinite(epoch.train_loss + epoch.validation_loss):
            raise RunError(
                f"{folder.as_posix()}: the loss of epoch {number} is not finite (train {epoch.train_loss}, validation "
                f"{epoch.validation_loss}); train again with a lower lr, or with --set mixed_precision=false"
            )
        optimizer_schedule.epoch_ended(epoch.validation_frame_accuracy)
        best = epoch == best_of([*history, epoch])
        history.append(epoch)
        # All is written before the state that says this epoch is done: killed in between, it is run again and the
        # same is written once more.
        if board:
            board.epoch(epoch, validated.quadrants)
        if ranks.first:
            best_weights = writer.kept(kept.state_dict()) if best else None
            last = {
                "recipe": recipe.to_toml(),
                "data": fingerprints,
                "teacher": teacher.facts["weights_sha256"] if teacher else None,
                "history": [epoch.to_dict() for epoch in history],
                "model": model.state_dict(),
                **({"average": ema.state_dict()} if ema else {}),
                "course": optimizer_schedule.state_dict(),
                "scaler": scaler.state_dict(),
            }
            writer.write(
                partial(_write_epoch, folder, recipe, contract, best_weights, writer.kept(last), facts, tuple(history))
            )
        reporter.epoch(epoch, recipe.epochs, best)

    writer.wait()
    if ranks.first:
        facts = calibrate_run(folder, facts, recipe, validation, validation_store, where)
        record.write(folder, facts, history, finished=True)
    return Fitted(folder, tuple(history), best_of(history), failures, facts.get("calibration"))


def _write_epoch(
    folder: Path,
    recipe: Recipe,
    contract: Contract,
    weights: Mapping[str, torch.Tensor] | None,
    last: Mapping[str, Any],
    facts: Mapping[str, Any],
    history: tuple[Epoch, ...],
) -> None:
    """Write an epoch's files; `weights` are those of the best epoch, where that is this one."""
    if weights is not None:
        checkpoint.save_best(folder, weights, recipe, contract, history[-1].epoch)
    checkpoint.save_last(folder, last)
    record.write(folder, facts, history, finished=False)
