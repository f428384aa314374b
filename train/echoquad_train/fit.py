"""Fitting: from a data folder and a recipe to a run folder. Reads from top to bottom.

Every epoch seeds its own draws from the run's seed and its number, so a run that was killed and resumed goes through
the same batches as one that was not, and no generator's state has to be kept.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import DatasetError, RunError
from echoquad_runtime.files import make_folder, write_bytes
from echoquad_runtime.inputs import Failure
from echoquad_runtime.vote import decide
from echoquad_train import checkpoint, record, schedule
from echoquad_train.augment import augment
from echoquad_train.backbones import BACKBONES
from echoquad_train.dataset import QuadrantStore, Split, load_quadrants, read_classes, read_split
from echoquad_train.device import Device, autocast_dtype, choose_device, make_deterministic
from echoquad_train.distill import Teacher, distillation_loss, load_teacher, teacher_quadrants
from echoquad_train.engine import TorchEngine
from echoquad_train.history import Epoch, best_of, out_of_patience
from echoquad_train.model import QuadrantClassifier, build_model, set_trained
from echoquad_train.recipe import Recipe

__all__ = ["Fitted", "Reporter", "fit"]

VALIDATION_BATCH = 64  # quadrants; of no influence on the result

SMALLEST_MIXED = 17
"""Input size from which mixed precision is used. Below it layer4 begins on a 1x1 map, and oneDNN (torch 2.14, bfloat16)
leaves whatever was in memory as the gradient of weights that see nothing but padding."""


class Reporter(Protocol):
    """Hears of the progress."""

    def decoding(self, split: str, done: int, total: int) -> None:
        """Hear that a frame was decoded."""

    def started(self, device: str, precision: str, train: Split, validation: Split) -> None:
        """Hear what will be trained, on what."""

    def batch(self, epoch: int, done: int, total: int) -> None:
        """Hear that a batch is done."""

    def epoch(self, epoch: Epoch, epochs: int, best: bool) -> None:
        """Hear of a finished epoch."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A finished run: its folder, its epochs, the best of them, and the frames that could not be read."""

    folder: Path
    history: tuple[Epoch, ...]
    best: Epoch
    failures: tuple[Failure, ...]


def fit(
    data: Path,
    folder: Path,
    recipe: Recipe,
    *,
    device: Device = "auto",
    resume: bool,
    reporter: Reporter,
    teacher: Path | None = None,
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

    Raises
    ------
    DatasetError, ConfigError, RunError, DeviceUnavailableError, OutputError
        If the data, the recipe, the run folder, the device or the disk stand in the way.
    """
    where = choose_device(device)
    make_deterministic(where)
    state = _open_folder(folder, recipe, resume)
    classes = read_classes(data)
    contract = recipe.contract(classes)
    train, validation = (read_split(data, split, classes) for split in ("train", "validation"))
    if state and state["data"] != [train.fingerprint, validation.fingerprint]:
        raise RunError(f"{folder.as_posix()}: the data has changed since the run was begun; train into another folder")
    master = load_teacher(teacher, contract, where) if teacher else None
    _require_same_teacher(folder, state, master, resume=resume)
    torch.manual_seed(recipe.seed)
    # A resumed run has weights of its own: it needs neither the network nor the file that it once began from.
    begin = recipe.replace(weights="none") if state else recipe
    model = build_model(begin, contract).to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    make_folder(folder)
    write_bytes(folder / checkpoint.RECIPE, recipe.to_toml().encode())

    # Every frame is decoded once, to 8-bit quadrants; no epoch opens a file again.
    with _abandoned_on_failure(folder, unless=resume):
        train_store, validation_store = (
            load_quadrants(split, contract, overflow=folder, progress=partial(reporter.decoding, split.name))
            for split in (train, validation)
        )
        progress = partial(reporter.decoding, f"{train.name} for the teacher")
        taught_store = (
            teacher_quadrants(master, train, train_store, overflow=folder, progress=progress) if master else train_store
        )
    failures = (*train_store.failures, *validation_store.failures)

    dtype = _mixed_dtype(recipe, recipe.backbone, recipe.input_size, where)
    precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    teacher_dtype = _mixed_dtype(recipe, master.model.name, master.contract.input_size, where) if master else None
    teacher_facts = master.facts if master else None
    facts = record.facts(data, recipe, contract, (train, validation), failures, where.type, precision, teacher_facts)
    if resume:
        facts["created"] = _begun(folder) or facts["created"]
    reporter.started(where.type, precision, train, validation)

    # Training state: what a resumed run finds again.
    history = [Epoch(**row) for row in state["history"]] if state else []
    scaler = torch.amp.GradScaler(where.type, enabled=dtype is torch.float16)
    phase: schedule.Phase | None = None
    course: schedule.Course | None = None
    if state:
        model.load_state_dict(state["model"])
        if state["scaler"]:  # empty where the run was not in float16 before
            scaler.load_state_dict(state["scaler"])
    record.write(folder, facts, history, finished=False)
    weights = _class_weights(train_store.labels, len(classes)).to(where) if recipe.class_weights else None

    for number in range(len(history) + 1, recipe.epochs + 1):
        if out_of_patience(history, recipe):
            break
        started = time.perf_counter()
        torch.manual_seed(_seed(recipe.seed, number, 0))  # dropout's draws
        generator = torch.Generator().manual_seed(_seed(recipe.seed, number, 1))  # batches' and augmentation's
        batches = list(_batches(train_store, recipe, generator))

        # A phase trains the layers it names with an optimizer of its own.
        begun, phase = phase, schedule.phase_of(recipe, number)
        groups = set_trained(model, phase.layers)
        if course is None or phase != begun:
            course = schedule.Course(groups, recipe, phase, steps_per_epoch=len(batches))
            if state and history and phase == schedule.phase_of(recipe, len(history)):
                course.load_state_dict(state["course"])
        state = None

        loss_sum, correct, seen = 0.0, 0, 0
        for done, chosen in enumerate(batches, 1):
            quadrants, labels = _take(train_store, chosen, where)
            twin = generator.clone_state()  # draws what `generator` will: the same view at another size
            images = augment(quadrants, recipe, generator)
            with torch.autocast(where.type, dtype, enabled=dtype is not None):
                logits = model(images)
            logits = logits.float()
            loss = F.cross_entropy(logits, labels, weights, label_smoothing=recipe.label_smoothing)
            if master:
                same = taught_store is train_store
                view = images if same else augment(_take(taught_store, chosen, where)[0], recipe, twin)
                answers = master(view, teacher_dtype)
                loss = distillation_loss(loss, logits, answers, recipe.distill_weight, recipe.distill_temperature)
            rate = course.step(loss, scaler)
            loss_sum += loss.item() * len(labels)
            correct += int((logits.argmax(dim=1) == labels).sum())
            seen += len(labels)
            reporter.batch(number, done, len(batches))

        model.eval()
        validated = _validate(model, contract, validation_store, where)
        epoch = Epoch(
            epoch=number,
            phase=phase.name,
            lr=rate,
            train_loss=loss_sum / seen,
            train_patch_accuracy=correct / seen,
            seconds=round(time.perf_counter() - started, 2),
            **validated,
        )
        if not math.isfinite(epoch.train_loss + epoch.validation_loss):
            raise RunError(
                f"{folder.as_posix()}: the loss of epoch {number} is not finite (train {epoch.train_loss}, validation "
                f"{epoch.validation_loss}); train again with a lower lr, or with --set mixed_precision=false"
            )
        course.epoch_ended(epoch.validation_frame_accuracy)
        best = epoch == best_of([*history, epoch])
        history.append(epoch)
        # The best weights are written before the state that says this epoch is done: killed in between, the epoch
        # is run again and the same weights are written once more.
        if best:
            checkpoint.save_best(folder, model, recipe, contract, number)
        checkpoint.save_last(
            folder,
            {
                "recipe": recipe.to_toml(),
                "data": [train.fingerprint, validation.fingerprint],
                "teacher": master.facts["weights_sha256"] if master else None,
                "history": [epoch.to_dict() for epoch in history],
                "model": model.state_dict(),
                "course": course.state_dict(),
                "scaler": scaler.state_dict(),
            },
        )
        record.write(folder, facts, history, finished=False)
        reporter.epoch(epoch, recipe.epochs, best)

    record.write(folder, facts, history, finished=True)
    return Fitted(folder, tuple(history), best_of(history), failures)


def _open_folder(folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Give the state to resume from, None for a new run; refuse to train over another run."""
    label = folder.as_posix()
    held = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if not resume:
        if held:
            raise RunError(f"{label}: is there and not empty; go on with it by --resume, or choose another --out")
        return None
    if not (folder / checkpoint.LAST).exists():
        # A run that was killed before its first epoch was done begins again; where there is no run, that is refused.
        if not (folder / checkpoint.RECIPE).is_file():
            checkpoint.read_info(folder)
        return None
    state = checkpoint.load_last(folder)
    if Recipe.from_toml(state["recipe"]) != recipe:  # as text, it may lack fields that have come since
        raise RunError(f"{label}: the run was begun with another recipe; resume it with the options it was begun with")
    return state


def _require_same_teacher(folder: Path, state: dict[str, Any] | None, teacher: Teacher | None, *, resume: bool) -> None:
    """Refuse to go on with a run under another teacher than it was begun with, without it, or with a first one."""
    if not resume:
        return
    if state:
        begun = state.get("teacher")  # not there in a run of a release that knew none
    else:
        try:
            facts = checkpoint.read_info(folder).get("teacher")
        except RunError:  # killed before it was written
            return
        begun = facts.get("weights_sha256") if isinstance(facts, dict) else None
    label = folder.as_posix()
    if begun and teacher is None:
        raise RunError(f"{label}: the run was begun with a teacher; resume it with the same --teacher RUN")
    if teacher and begun != teacher.facts["weights_sha256"]:
        found = "another teacher" if begun else "no teacher"
        raise RunError(f"{label}: the run was begun with {found}; resume it with the options it was begun with")


@contextlib.contextmanager
def _abandoned_on_failure(folder: Path, *, unless: bool) -> Iterator[None]:
    """Take back a run folder that holds no more than its recipe: nothing was trained, so nothing is to be resumed."""
    try:
        yield
    except DatasetError:
        if not unless:
            with contextlib.suppress(OSError):
                (folder / checkpoint.RECIPE).unlink()
                folder.rmdir()
        raise


def _begun(folder: Path) -> str | None:
    """Find when a run that is resumed was begun."""
    try:
        created = checkpoint.read_info(folder).get("created")
    except RunError:  # killed before it was written
        return None
    return created if isinstance(created, str) else None


def _mixed_dtype(recipe: Recipe, backbone: str, size: int, where: torch.device) -> torch.dtype | None:
    """Choose a network's type of mixed precision; None where it is not wanted, not had, or of no use."""
    slower = where.type == "cpu" and not BACKBONES[backbone].mixed_on_cpu
    return autocast_dtype(where) if recipe.mixed_precision and size >= SMALLEST_MIXED and not slower else None


def _batches(store: QuadrantStore, recipe: Recipe, generator: torch.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Draw an epoch's quadrants, as indices into [F * 4], a batch at a time."""
    count = 4 * len(store.labels)
    if recipe.balanced_sampler:
        per_class = np.bincount(store.labels)
        weights = torch.from_numpy(np.repeat(1.0 / per_class[store.labels], 4))
        order = torch.multinomial(weights, count, replacement=True, generator=generator)
    else:
        order = torch.randperm(count, generator=generator)
    for start in range(0, count, recipe.batch_size):
        chosen = order[start : start + recipe.batch_size].numpy()
        if len(chosen) > 1:  # batch normalisation cannot be computed over one sample of a 1x1 map
            yield chosen


def _take(
    store: QuadrantStore, chosen: npt.NDArray[np.int64], where: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    frames, corners = chosen // 4, chosen % 4
    quadrants = torch.from_numpy(store.quadrants[frames, corners][:, None])
    labels = torch.from_numpy(store.labels[frames])
    if where.type == "cuda":
        return quadrants.pin_memory().to(where, non_blocking=True), labels.to(where)
    return quadrants, labels


def _class_weights(labels: npt.NDArray[np.int64], classes: int) -> torch.Tensor:
    """Weigh each class by 1 / its count, with the mean 1."""
    weights = 1.0 / np.bincount(labels, minlength=classes)
    return torch.from_numpy(weights / weights.mean()).float()


def _validate(
    model: QuadrantClassifier, contract: Contract, store: QuadrantStore, where: torch.device
) -> dict[str, float]:
    """Judge the validation frames in float32, as the export will, and vote as the contract says."""
    engine = TorchEngine(model, contract, where)
    flat = store.quadrants.reshape(-1, 1, *store.quadrants.shape[2:])
    parts = [
        engine.infer(np.ascontiguousarray(flat[i : i + VALIDATION_BATCH]))
        for i in range(0, len(flat), VALIDATION_BATCH)
    ]
    probabilities = np.concatenate([part[1] for part in parts])
    labels = np.repeat(store.labels, 4)
    decision = decide(probabilities.reshape(-1, 4, len(contract.classes)), contract.vote, contract.vote_weights)
    true = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)
    return {
        "validation_loss": float(-np.log(true).mean()),
        "validation_patch_accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        "validation_frame_accuracy": float((decision.labels == store.labels).mean()),
    }


def _seed(seed: int, epoch: int, stream: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0] >> 1)
