"""``echoquad train``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from enum import StrEnum
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from echoquad.cli.console import Progress, list_failures, mute, note
from echoquad.cli.declare import Argument, Option
from echoquad.cli.extras import missing_extra, require_extra
from echoquad.cli.options import Every, Flip, Matrices, StreamName, TorchDevice, TorchDeviceName, reading_of

if TYPE_CHECKING:
    from echoquad.cli.options import FlipName
    from echoquad_runtime.frames.formats import ReadOptions
    from echoquad_train.parallel.ranks import Ranks
    from echoquad_train.recipe import Recipe

__all__ = ["LinearName", "TrainingProgress", "train"]


class LinearName(StrEnum):
    """Linear classifiers, by the names that --fit takes."""

    linear_svm = "linear-svm"
    logistic = "logistic"


def train(
    data: Annotated[Path, Argument(metavar="DATA", help="Folder with {train,validation}/CLASS/**/*.png|jpg|...")],
    out: Annotated[Path, Option("--out", metavar="RUN", help="Run folder to write; new or empty.")],
    recipe: Annotated[
        str | None,
        Option("--recipe", metavar="NAME|FILE", help="transfer, scratch or a TOML file; transfer if not given."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change any field of the recipe, as in backbone=mobilenet_v3_small; may be given again.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        Option("--weights", metavar="NAME|FILE", help="Weights to begin from: imagenet, none or a file."),
    ] = None,
    input_size: Annotated[
        int | None, Option("--input-size", metavar="N", help="Side in pixels that a quadrant is resized to.")
    ] = None,
    epochs: Annotated[int | None, Option("--epochs", metavar="N", help="Epochs, at most.")] = None,
    batch_size: Annotated[int | None, Option("--batch-size", metavar="N", help="Quadrants a batch.")] = None,
    teacher: Annotated[
        Path | None,
        Option(
            "--teacher",
            metavar="RUN",
            help="Finished run or ensemble to distil from, of the same classes; every batch costs its forward pass as "
            "well. Backbone (--set backbone=mobilenet_v3_small) and input size may be smaller than its own; how much "
            "it counts: --set distill_weight=0.7, --set distill_temperature=4.",
        ),
    ] = None,
    folds: Annotated[
        int | None,
        Option(
            "--folds",
            metavar="K",
            min=2,
            help="Cross-validate: deal the train and validation frames (never test) into K folds, no patient in two, "
            "and train K runs, RUN/fold-1 and so on, each validated on the fold that it has not learned from. RUN "
            "then is an ensemble of them, with their out-of-fold figures.",
        ),
    ] = None,
    linear: Annotated[
        LinearName | None,
        Option(
            "--fit",
            help="Train no layer of the network: fit a linear classifier to what the backbone gives with its --weights "
            "(imagenet, or a file such as RUN/best.safetensors), its C chosen by cross-validation by patient.",
        ),
    ] = None,
    matrices: Matrices = False,
    flip: Flip = None,
    every: Every = 1,
    patient_regex: Annotated[
        str | None,
        Option(
            "--patient-regex",
            metavar="RE",
            help="Says whom a frame is of, as for `echoquad data audit`; to tell whether somebody is in both splits, "
            "and to deal --folds.",
        ),
    ] = None,
    device: TorchDevice = TorchDeviceName.auto,
    seed: Annotated[int | None, Option("--seed", metavar="N", help="Seed of all draws.")] = None,
    stream: Annotated[
        StreamName,
        Option(
            "--stream",
            help="Decode frames again for every batch, in worker processes: on, off, or auto, where neither memory nor "
            "RUN's disk has room for the decoded quadrants. The result is the same.",
        ),
    ] = StreamName.auto,
    workers: Annotated[
        int | None,
        Option("--workers", metavar="N", min=1, help="Processes that decode what is streamed; the CPUs, 8 at most."),
    ] = None,
    tensorboard: Annotated[
        bool, Option("--tensorboard", help="Write TensorBoard's event files to RUN/tensorboard as well.")
    ] = False,
    resume: Annotated[bool, Option("--resume", help="Go on with the run that RUN holds, by its own recipe.")] = False,
) -> None:
    """Train a quadrant classifier on labelled frames. What is not given here, the recipe says.

    Under torchrun, several processes train one classifier, each with its share of every batch.
    """
    from echoquad.cli.folds import is_folded, require_folds, train_folds
    from echoquad_runtime.errors import UsageError
    from echoquad_train.data.dataset import read_classes, read_split
    from echoquad_train.data.patients import patient_pattern
    from echoquad_train.parallel.torchrun import torchrun_rank
    from echoquad_train.recipe import Recipe

    mute(torchrun_rank().rank > 0)  # under torchrun, one process speaks for all
    require_extra("train")
    if tensorboard and util.find_spec("tensorboard") is None:
        raise missing_extra("tensorboard", "tensorboard")
    given: dict[str, Any] = {
        "weights": weights,
        "input_size": input_size,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    chosen = Recipe.load(recipe or "transfer").replace(settings or (), **given)
    reading = _reading(out, resume, matrices, flip, every)
    patient_pattern(patient_regex)
    for split in ("train", "validation"):  # a wrong path is told now, not once torch is there
        read_split(data, split, read_classes(data), reading)
    if teacher and not teacher.is_dir():
        raise UsageError(f"--teacher: {teacher.as_posix()} is not there; expected a folder that `echoquad train` wrote")
    if not teacher and any(setting.strip().startswith("distill_") for setting in settings or ()):
        note("without --teacher, distill_weight and distill_temperature do nothing")
    _check_linear(linear, resume=resume, epochs=epochs, teacher=teacher)
    require_folds(folds, teacher, linear)
    if resume and not out.exists():
        raise UsageError(f"--resume: {out.as_posix()} is not there; train without --resume first")

    from echoquad_train.fitting.linear_probe import fit_linear
    from echoquad_train.fitting.loop import fit
    from echoquad_train.networks.device import choose_device
    from echoquad_train.parallel.ranks import joined
    from echoquad_train.runs.checkpoint import RECIPE

    if resume and not (recipe or settings or given) and (out / RECIPE).is_file():
        chosen = Recipe.load(str(out / RECIPE))
    if folds or (resume and is_folded(out)):
        code = train_folds(
            data,
            out,
            chosen,
            folds,
            patient_regex,
            device=device.value,
            resume=resume,
            stream=stream.value,
            workers=workers,
            tensorboard=tensorboard,
            reading=reading,
        )
        raise SystemExit(code)
    with (
        TrainingProgress(chosen) as progress,
        joined(choose_device(device.value)) as ranks,
        _told_once(ranks),
    ):
        if linear and ranks.count > 1:
            raise UsageError(f"--fit {linear.value} under torchrun: one process fits it; start it without torchrun")
        if linear:
            fitted = fit_linear(
                data,
                out,
                chosen,
                linear.value,
                device=device.value,
                reporter=progress,
                reading=reading,
                patient_regex=patient_regex,
            )
        else:
            fitted = fit(
                data,
                out,
                chosen,
                device=device.value,
                resume=resume,
                reporter=progress,
                teacher=teacher,
                stream=stream.value,
                workers=workers,
                tensorboard=tensorboard,
                ranks=ranks,
                reading=reading,
                patient_regex=patient_regex,
            )
    if not ranks.first:
        raise SystemExit(0)
    best = fitted.best
    note(
        f"best: epoch {best.epoch}, validation frame accuracy {best.validation_frame_accuracy:.4f} "
        f"(quadrants {best.validation_patch_accuracy:.4f}); wrote {out.as_posix()}/"
    )
    if fitted.calibration:
        note(calibration_line(fitted.calibration))
    note(f"next: echoquad export {out.as_posix()} --out BUNDLE")
    raise SystemExit(list_failures(fitted.failures, done=1))


@contextlib.contextmanager
def _told_once(ranks: Ranks) -> Iterator[None]:
    """Have the process that fails first tell of it, whichever it is, and the others end without a word."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        mute(not ranks.fails_first())
        raise


def _check_linear(linear: LinearName | None, *, resume: bool, epochs: int | None, teacher: Path | None) -> None:
    from echoquad_runtime.errors import UsageError

    given = {"--resume": resume, "--epochs": epochs is not None, "--teacher": teacher is not None}
    if linear and (found := [name for name, is_given in given.items() if is_given]):
        raise UsageError(
            f"--fit {linear.value} with {', '.join(found)}: a linear classifier is fitted at once, to the labels; "
            f"leave out {'it' if len(found) == 1 else 'them'}, or --fit"
        )


def _reading(out: Path, resume: bool, matrices: bool, flip: FlipName | None, every: int) -> ReadOptions:
    """Say how frames are read: as told, and where nothing is told of a run that is resumed, as it was begun."""
    from echoquad_runtime.frames.formats import DEFAULT_READ_OPTIONS, ReadOptions

    if resume and (matrices, flip, every) == (False, None, 1):
        from echoquad_runtime.errors import RunError
        from echoquad_train.runs.checkpoint import read_info

        with contextlib.suppress(RunError):  # killed before it was written, or not there, which is told elsewhere
            return ReadOptions.found_in(read_info(out).get("data"))
    return reading_of(matrices, flip, every, DEFAULT_READ_OPTIONS)


def calibration_line(found: Mapping[str, Any]) -> str:
    """Say what calibrating a run has come to, of the ``calibration`` in its record."""
    before, after, crossed = found["before"], found["after"], found["cross_fitted"]
    fitted = f"temperatures {found['temperature']:g} of a quadrant, {found['frame_temperature']:g} of a frame" + (
        f", {found['note']}" if found["note"] else ""
    )
    words = f"calibration: {fitted}; ECE {before['ece']:.3f} before, {after['ece']:.3f} after"
    words += f", {crossed['ece']:.3f} cross-fitted by patient" if crossed else ""
    return f"{words}; validation frame accuracy {after['frame_accuracy']:.4f}"


class TrainingProgress:
    """Shows a run, of a recipe where that is known: a bar for each epoch, and a line of figures that stays."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        self._recipe = recipe
        self._progress: Progress | None = None
        self._key: object = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def decoding(self, split: str, done: int, total: int) -> None:
        """Show that a frame was decoded."""
        self._show(f"decoding {split}", done, total)

    def started(self, device: str, precision: str, train: Any, validation: Any) -> None:
        """Say what will be trained, on what."""
        self._close()
        for split in (train, validation):
            counts = ", ".join(f"{name} {count}" for name, count in split.counts.items())
            note(f"{split.name}: {len(split.frames)} frames ({counts})")
        from echoquad_train.training.optimizer_schedule import progressive_epochs

        small = progressive_epochs(self._recipe) if self._recipe else 0
        sizes = f"; the first {small} epochs on smaller quadrants, validated at full size" if small else ""
        note(f"training on {device} in {precision}{sizes}")

    def audited(self, leaks: Any) -> None:
        """Say what is in both splits."""
        note(leaks.summary)

    def batch(self, epoch: int, done: int, total: int) -> None:
        """Show that a batch is done."""
        self._show(f"epoch {epoch}", done, total)

    def epoch(self, epoch: Any, epochs: int, best: bool) -> None:
        """Print the epoch's line."""
        self._close()
        note(
            f"Epoch {epoch.epoch:02d}/{epochs} [{epoch.phase}] "
            f"train loss {epoch.train_loss:.4f} acc {epoch.train_patch_accuracy:.4f} | "
            f"val loss {epoch.validation_loss:.4f} acc {epoch.validation_patch_accuracy:.4f} "
            f"frame acc {epoch.validation_frame_accuracy:.4f} | lr {epoch.lr:.1e} | {epoch.seconds:.1f} s"
            f"{' | best' if best else ''}"
        )

    def _show(self, label: str, done: int, total: int) -> None:
        if self._key != label or self._progress is None:
            self._close()
            self._progress, self._key = Progress(label, total).__enter__(), label
        self._progress.update(done, total)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
        self._progress = None
