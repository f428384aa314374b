"""Training loop: from a data folder and a recipe to a run folder.

Every epoch seeds its random generators from the run's seed and the epoch's number. A run that was killed and resumed
therefore trains on the same batches as an uninterrupted one, and no generator state has to be saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from echoquad_runtime.errors import OutputError, RunError
from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.storage.atomic import make_folder, write_bytes
from echoquad_train.curation.leaks import Leaks, leaks_of_stores
from echoquad_train.data.dataset import Split, Store, read_classes, read_split
from echoquad_train.data.patients import patient_pattern
from echoquad_train.data.stream import Storage, Stream
from echoquad_train.fitting.resume import (
    locked_run_folder,
    open_run_folder,
    remove_recipe_on_failure,
    require_same_teacher,
    saved_value,
    state_errors,
)
from echoquad_train.fitting.run_temperatures import fit_run_temperatures
from echoquad_train.networks.classifier import build_model
from echoquad_train.networks.device import Device, choose_device, make_deterministic, mixed_dtype
from echoquad_train.parallel.ranks import ALONE, Ranks
from echoquad_train.recipe import Recipe
from echoquad_train.runs import checkpoint, run_metadata
from echoquad_train.runs.background_writer import BackgroundWriter
from echoquad_train.runs.history import Epoch, model_epoch, should_stop_early
from echoquad_train.runs.tensorboard_writer import TensorboardWriter
from echoquad_train.training.batches import DeviceFeed, epoch_generator
from echoquad_train.training.distillation import Teacher, load_teacher, open_teacher_store
from echoquad_train.training.ema_weights import EmaWeights
from echoquad_train.training.optimizer_schedule import (
    OptimizerSchedule,
    Phase,
    phase_of,
    progressive_epochs,
    training_size,
)
from echoquad_train.training.sampling import class_weights, draw_batches, epoch_seed
from echoquad_train.training.train_step import Distillation, Trainer, TrainMetrics, step_recorder
from echoquad_train.training.validation import ValidationMetrics, validate

__all__ = ["FitResult", "Reporter", "TrainingRun", "fit"]


class Reporter(Protocol):
    """Receives progress events."""

    def decoding(self, split: str, done: int, total: int) -> None:
        """Receive the number of decoded frames."""

    def started(self, device: str, precision: str, train: Split, validation: Split) -> None:
        """Receive the device, the precision and the data, before the first epoch."""

    def audited(self, leaks: Leaks) -> None:
        """Receive the patients and frames that are in both splits."""

    def batch(self, epoch: int, done: int, total: int) -> None:
        """Receive the number of finished batches of an epoch."""

    def epoch(self, epoch: Epoch, epochs: int, best: bool) -> None:
        """Receive the figures of a finished epoch, and whether its weights are the model so far."""


class _NoReporter:
    """Reports nothing: for every rank but the first."""

    def _ignore(self, *_: Any, **__: Any) -> None: ...

    decoding = started = audited = batch = epoch = _ignore


@dataclass(frozen=True, slots=True)
class FitResult:
    """A finished run: its folder, its epochs, that of the model (`best`), the unreadable frames, its calibration."""

    folder: Path
    history: tuple[Epoch, ...]
    best: Epoch
    failures: tuple[Failure, ...]
    calibration: dict[str, Any] | None = None


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
    extra_metadata: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train a classifier.

    Parameters
    ----------
    data
        ``DATA/{train,validation}/CLASS/**``.
    folder
        The run folder; created if it is missing.
    recipe
        How to train.
    device
        ``auto``, ``cpu`` or ``cuda``.
    resume
        Continue the run in `folder`, which must have the same recipe and data.
    reporter
        Receives progress events.
    teacher
        A finished run to distil from. A resumed run needs the teacher that it was started with.
    stream, workers
        Where quadrants are stored, and the number of decoding processes; see `echoquad_train.data.stream.Storage`.
        The result does not depend on them.
    tensorboard
        Also write event files; see `echoquad_train.runs.tensorboard_writer`.
    ranks
        The processes that train together, from `echoquad_train.parallel.ranks.joined`. Each calls this function with
        the same arguments.
    reading
        How to read the data's files.
    patient_regex
        Extracts the patient from a frame's name; see `echoquad_train.data.patients.read_patient`. A resumed run
        defaults to the saved one.
    splits
        Train and validate on these instead of on `data`'s own splits; of the same classes.
    extra_metadata
        Additional keys for ``run.json``.

    Raises
    ------
    DatasetError, ConfigError, RunError, DeviceUnavailableError, OutputError
        If the data, the recipe, the run folder, the device or the disk cannot be used.
    """
    torch_device = choose_device(device)
    make_deterministic(torch_device)
    with ExitStack() as resources:
        ranks.from_first(lambda: resources.enter_context(locked_run_folder(folder)))
        run = TrainingRun(
            data,
            folder,
            recipe,
            torch_device,
            storage=resources.enter_context(Storage(folder, stream, workers)),
            # On CUDA the next epoch trains while the files of this one are written.
            writer=resources.enter_context(BackgroundWriter(background=torch_device.type == "cuda")),
            reporter=reporter if ranks.first else _NoReporter(),
            resume=resume,
            ranks=ranks,
            reading=reading,
            patient_regex=patient_regex,
            splits=splits,
            extra_metadata=extra_metadata or {},
        )
        run.prepare(teacher)
        if tensorboard and ranks.first:
            run.tensorboard = resources.enter_context(TensorboardWriter(folder, len(run.history)))
        try:
            for number in range(len(run.history) + 1, recipe.epochs + 1):
                if should_stop_early(run.history, recipe):
                    break
                run.epoch(number)
            return run.finish()
        except OutputError as error:
            kept = (
                "no epoch is" if not run.saved_epochs else f"the first {run.saved_epochs} of {recipe.epochs} epochs are"
            )
            raise OutputError(f"{error}; {kept} saved; then continue with `echoquad train --resume`") from error


@dataclass
class TrainingRun:
    """A run: call `prepare`, then `epoch` for each epoch, then `finish`. The attributes are the parameters of `fit`."""

    data: Path
    folder: Path
    recipe: Recipe
    device: torch.device
    storage: Storage
    writer: BackgroundWriter
    reporter: Reporter
    resume: bool
    ranks: Ranks
    reading: ReadOptions
    patient_regex: str | None
    splits: tuple[Split, Split] | None
    extra_metadata: Mapping[str, Any]
    tensorboard: TensorboardWriter | None = None
    saved_epochs: int = 0

    def prepare(self, teacher_folder: Path | None) -> None:
        """Read the data, build the model, and load the saved state of a resumed run."""
        recipe, device = self.recipe, self.device
        state = self.ranks.from_first(lambda: open_run_folder(self.folder, recipe, self.resume))
        if self.resume and self.patient_regex is None:
            self.patient_regex = saved_value(self.folder, "patient_regex", str)
        pattern = patient_pattern(self.patient_regex)
        self._read_splits(state)
        teacher = load_teacher(teacher_folder, self.contract, device) if teacher_folder else None
        self.teacher_sha256 = teacher.metadata["weights_sha256"] if teacher else None
        self.ranks.from_first(lambda: require_same_teacher(self.folder, state, self.teacher_sha256, resume=self.resume))
        torch.manual_seed(recipe.seed)
        # A resumed run loads its own weights: it needs neither the network nor the file that it started from.
        initial = recipe.replace(weights="none") if state else recipe
        model = build_model(initial, self.contract)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        make_folder(self.folder)
        if self.ranks.first:
            write_bytes(self.folder / checkpoint.RECIPE, recipe.to_toml().encode())
        teacher_store = self._open_stores(teacher)

        dtype = mixed_dtype(recipe, recipe.backbone, recipe.input_size, device)
        precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        self._collect_metadata(precision, teacher)
        self.reporter.started(device.type, precision, self.train, self.validation)
        if self.ranks.first:
            stores = {self.train.name: self.train_store, self.validation.name: self.validation_store}
            leaks = leaks_of_stores(stores, pattern, self.contract.quadrants)
            self.metadata |= {"patient_regex": self.patient_regex, "audit": leaks.counts}
            self.reporter.audited(leaks)

        distillation = None
        if teacher is not None and teacher_store is not None:
            size = teacher.contract.input_size
            distillation = Distillation(teacher, teacher_store, mixed_dtype(recipe, teacher.model.name, size, device))
        self._build_trainer(dtype, distillation, state)

    def _read_splits(self, state: Mapping[str, Any] | None) -> None:
        """List the frames; refuse to resume with other data."""
        classes = read_classes(self.data)
        self.contract = self.recipe.contract(classes)
        self.train, self.validation = self.splits or (
            read_split(self.data, split, classes, self.reading) for split in ("train", "validation")
        )
        self.fingerprints = [self.train.fingerprint, self.validation.fingerprint]
        if state and state["data"] != self.fingerprints:
            raise RunError(
                f"{self.folder.as_posix()}: the data has changed since the run began; train into another folder"
            )

    def _open_stores(self, teacher: Teacher | None) -> Store | None:
        """Decode every frame once, to 8-bit quadrants, unless they are streamed; return the teacher's store."""
        teacher_store = None
        with remove_recipe_on_failure(self.folder, enabled=self.ranks.first and not self.resume):
            self.train_store, self.validation_store = (
                self.storage.open(split, self.contract, partial(self.reporter.decoding, split.name))
                for split in (self.train, self.validation)
            )
            if teacher:
                progress = partial(self.reporter.decoding, f"{self.train.name} for the teacher")
                teacher_store = open_teacher_store(teacher, self.train, self.train_store, self.storage, progress)
        self.failures = (*self.train_store.failures, *self.validation_store.failures)
        return teacher_store

    def _collect_metadata(self, precision: str, teacher: Teacher | None) -> None:
        """Collect what ``run.json`` holds before the first epoch."""
        self.metadata = run_metadata.collect_metadata(
            self.data,
            self.recipe,
            self.contract,
            (self.train, self.validation),
            self.failures,
            self.device.type,
            precision,
            teacher.metadata if teacher else None,
            self.reading,
        )
        if small := progressive_epochs(self.recipe):
            self.metadata["progressive_epochs"] = small
        self.metadata |= self.extra_metadata
        origin = self.model.pretrained.to_dict() if self.model.pretrained else None
        if origin or (origin := saved_value(self.folder, "pretrained", dict) if self.resume else None):
            self.metadata["pretrained"] = origin
        if self.resume:
            self.metadata["created"] = saved_value(self.folder, "created", str) or self.metadata["created"]

    def _build_trainer(
        self, dtype: torch.dtype | None, distillation: Distillation | None, state: Mapping[str, Any] | None
    ) -> None:
        """Build what an epoch needs, in the saved state of a resumed run."""
        recipe, device, classes = self.recipe, self.device, len(self.contract.classes)
        self.history = [Epoch(**row) for row in state["history"]] if state else []
        self.saved_epochs = len(self.history)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        if state:
            with state_errors(self.folder):
                self.model.load_state_dict(state["model"])
                if state["scaler"]:  # empty if the run was not in float16 before
                    self.scaler.load_state_dict(state["scaler"])
            if "best_sha256" in state:
                self.metadata["best_sha256"] = state["best_sha256"]
        if self.ranks.first:
            run_metadata.write_run(self.folder, self.metadata, self.history, self.recipe, finished=False)
        weights = class_weights(self.train_store.labels, classes) if recipe.class_weights else torch.ones(classes)
        recorder = step_recorder(device, self.ranks, self.scaler)
        self.capturable = recorder is not None
        self.ema = EmaWeights(self.model, recipe.ema_decay, capturable=self.capturable) if recipe.ema_decay else None
        if self.ema and state:
            with state_errors(self.folder):
                self.ema.load_state_dict(state["ema"])
        self.evaluated = self.ema.model if self.ema else self.model  # the model that is validated and saved
        self.trainer = Trainer(
            self.model,
            recipe,
            self.train_store,
            device,
            dtype,
            self.scaler,
            weights.to(device),
            distillation,
            self.ema,
            self.ranks,
            recorder,
        )
        self.validation_feed = DeviceFeed(self.validation_store, device)
        self.phase: Phase | None = None
        self.schedule: OptimizerSchedule | None = None
        self.saved_schedule = state["optimizer_schedule"] if state and self.history else None

    def epoch(self, number: int) -> None:
        """Train and validate epoch `number`, counted from 1, and write the run's files."""
        started = time.perf_counter()
        trained = self._train(number)
        validated = validate(self.evaluated, self.contract, self.validation_feed, self.ranks)
        assert self.phase is not None and self.schedule is not None
        epoch = make_epoch(number, self.phase.name, trained, validated, started)
        if not math.isfinite(epoch.train_loss + epoch.validation_loss):
            raise RunError(
                f"{self.folder.as_posix()}: the loss of epoch {number} is not finite (train {epoch.train_loss}, "
                f"validation {epoch.validation_loss}); train again with a lower lr, or with --set mixed_precision=false"
            )
        self.schedule.end_epoch(epoch.validation_frame_accuracy)
        self.history.append(epoch)
        best = epoch == model_epoch(self.history, self.recipe)
        # The saved state comes last: a run that is killed before it repeats the epoch and writes the same files again.
        if self.tensorboard:
            self.tensorboard.epoch(epoch, validated.quadrant_accuracies)
        if self.ranks.first:
            self._write_epoch(best)
        self.reporter.epoch(epoch, self.recipe.epochs, best)

    def finish(self) -> FitResult:
        """Fit the temperatures of the model, and mark the run as finished."""
        self.writer.wait()
        if self.ranks.first:
            self.metadata = fit_run_temperatures(
                self.folder, self.metadata, self.recipe, self.validation, self.validation_store, self.device
            )
            run_metadata.write_run(self.folder, self.metadata, self.history, self.recipe, finished=True)
        calibration, best = self.metadata.get("calibration"), model_epoch(self.history, self.recipe)
        return FitResult(self.folder, tuple(self.history), best, self.failures, calibration)

    def _train(self, number: int) -> TrainMetrics:
        """Train on every batch of an epoch."""
        recipe, seed = self.recipe, self.recipe.seed
        torch.manual_seed(epoch_seed(seed, number, 0))  # for dropout
        generator = torch.Generator().manual_seed(epoch_seed(seed, number, 1))
        batches = list(draw_batches(self.train_store, recipe, generator))
        augmentation_generator = epoch_generator(self.device, generator, epoch_seed(seed, number, 2))

        # A new phase trains other layers with a new optimizer.
        previous, self.phase = self.phase, phase_of(recipe, number)
        groups = self.trainer.train_layers(self.phase.layers)
        if self.schedule is None or self.phase != previous:
            self.schedule = OptimizerSchedule(groups, recipe, self.phase, len(batches), capturable=self.capturable)
            if self.saved_schedule and self.phase == phase_of(recipe, len(self.history)):
                with state_errors(self.folder):
                    self.schedule.load_state_dict(self.saved_schedule)
            self.saved_schedule = None

        if self.tensorboard and not self.history:
            self.tensorboard.batch(self.trainer.loader.preview(batches, augmentation_generator.clone_state()).cpu())
        progress, size = partial(self.reporter.batch, number), training_size(recipe, number)
        return self.trainer.epoch(batches, augmentation_generator, self.schedule, progress, size)

    def _write_epoch(self, best: bool) -> None:
        """Write the files of the last epoch, in the background on CUDA."""
        assert self.schedule is not None
        state = {
            "recipe": self.recipe.to_toml(),
            "data": self.fingerprints,
            "teacher": self.teacher_sha256,
            "history": [epoch.to_dict() for epoch in self.history],
            "model": self.model.state_dict(),
            **({"ema": self.ema.state_dict()} if self.ema else {}),
            "optimizer_schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        best_weights = self.writer.snapshot(self.evaluated.state_dict()) if best else None
        snapshot, history = self.writer.snapshot(state), tuple(self.history)

        def write() -> None:
            if best_weights is not None:
                number = history[-1].epoch
                digest = checkpoint.save_best(self.folder, best_weights, self.recipe, self.contract, number)
                self.metadata["best_sha256"] = digest
            checkpoint.save_last(self.folder, {**snapshot, "best_sha256": self.metadata.get("best_sha256")})
            self.saved_epochs = len(history)
            run_metadata.write_run(self.folder, self.metadata, history, self.recipe, finished=False)

        self.writer.write(write)


def make_epoch(
    number: int, phase: str, trained: TrainMetrics | ValidationMetrics, validated: ValidationMetrics, started: float
) -> Epoch:
    """Combine an epoch's training and validation metrics; `started` is a value of `time.perf_counter`."""
    return Epoch(
        epoch=number,
        phase=phase,
        lr=trained.learning_rate if isinstance(trained, TrainMetrics) else 0.0,
        train_loss=trained.loss,
        train_patch_accuracy=trained.quadrant_accuracy,
        seconds=round(time.perf_counter() - started, 2),
        validation_loss=validated.loss,
        validation_patch_accuracy=validated.quadrant_accuracy,
        validation_frame_accuracy=validated.frame_accuracy,
    )
