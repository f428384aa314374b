"""The command ``echoquad train``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from echoquad.cli.commands.train.training_progress import TrainingProgress, describe_calibration
from echoquad.cli.framework.console import format_command, mute, print_failures, print_skipped, print_status
from echoquad.cli.framework.extras import missing_extra, require_extra
from echoquad.cli.framework.options import (
    Every,
    Flip,
    FlipName,
    Matrices,
    PatientRegex,
    QuadrantLayout,
    TorchDevice,
    read_options,
)

if TYPE_CHECKING:
    from echoquad_runtime.frames.formats import ReadOptions
    from echoquad_train.parallel.ranks import Ranks

__all__ = ["train"]


def train(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with {train,validation}/CLASS/**/*.png|jpg|...")],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Run folder to write; new or empty.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", metavar="NAME|FILE", help="transfer, scratch, lite or a TOML file. Default: transfer."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change a field of the recipe, such as backbone=mobilenet_v3_small; may be repeated.",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="NAME|FILE", help="Initial weights: imagenet, none or a file.")
    ] = None,
    input_size: Annotated[
        int | None,
        typer.Option("--input-size", metavar="N", help="Width and height in pixels that quadrants are resized to."),
    ] = None,
    quadrant_layout: QuadrantLayout = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", help="Maximum number of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", metavar="N", help="Quadrants per batch.")] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            "--teacher",
            metavar="RUN",
            help="Finished run or ensemble of the same classes to distil from; each batch also costs its forward pass. "
            "The student may have a smaller backbone (--set backbone=mobilenet_v3_small) and input size. Weight and "
            "temperature: --set distill_weight=0.7, --set distill_temperature=4.",
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            "--folds",
            metavar="K",
            min=2,
            help="Cross-validate: divide the train and validation frames (never test) into K folds by patient and "
            "train K runs, RUN/fold-1 and so on, each measured on the fold that it holds out. A tenth of the patients "
            "of the other folds is its validation split. RUN becomes an ensemble, with out-of-fold figures.",
        ),
    ] = None,
    linear: Annotated[
        Literal["linear-svm", "logistic"] | None,
        typer.Option(
            "--fit",
            help="Train no layer of the network: fit a linear classifier to the features of the backbone with its "
            "--weights (imagenet, or a file such as RUN/best.safetensors). C is chosen by cross-validation by patient.",
        ),
    ] = None,
    matrices: Matrices = False,
    flip: Flip = None,
    every: Every = 1,
    patient_regex: PatientRegex = None,
    device: TorchDevice = "auto",
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Seed of the random number generators.")
    ] = None,
    stream: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(
            "--stream",
            help="Decode frames again for every batch, in worker processes: on, off, or auto, which streams if neither "
            "memory nor the disk of RUN has room for the decoded quadrants. The result is the same.",
        ),
    ] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            min=1,
            help="Processes that decode streamed frames. Default: the number of CPUs, at most 8.",
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard event files to RUN/tensorboard.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run in RUN, with its own recipe.")
    ] = False,
) -> None:
    """Train a quadrant classifier on labelled frames. The recipe provides what the options do not.

    Under torchrun, several processes train one classifier and share every batch.
    """
    from echoquad.cli.commands.train.folds import is_cross_validation, train_folds
    from echoquad_runtime.errors import UsageError
    from echoquad_train.data.patients import patient_pattern
    from echoquad_train.parallel.torchrun import torchrun_rank
    from echoquad_train.recipe import Recipe

    mute(torchrun_rank().rank > 0)  # under torchrun, one process prints
    require_extra("train")
    if tensorboard and util.find_spec("tensorboard") is None:
        raise missing_extra("tensorboard", "tensorboard")
    changes: dict[str, Any] = {
        "weights": weights,
        "input_size": input_size,
        "quadrant_layout": quadrant_layout,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    chosen = Recipe.load(recipe or "transfer").replace(settings or (), **changes)
    reading = _read_options(out, resume, matrices, flip, every)
    patient_pattern(patient_regex)
    _check_data(data, reading)  # reject a wrong path before torch is imported
    _check_teacher(teacher, settings or ())
    _check_linear(linear, resume=resume, epochs=epochs, teacher=teacher)
    _check_folds(folds, teacher, linear)
    if resume and not out.exists():
        raise UsageError(f"--resume: {out.as_posix()} does not exist; train without --resume first")

    from echoquad_train.fitting.linear_probe import fit_linear
    from echoquad_train.fitting.loop import fit
    from echoquad_train.networks.device import choose_device
    from echoquad_train.parallel.ranks import joined
    from echoquad_train.runs.checkpoint import RECIPE

    if resume and not (recipe or settings or changes) and (out / RECIPE).is_file():
        chosen = Recipe.load(str(out / RECIPE))
    if folds or (resume and is_cross_validation(out)):
        code = train_folds(
            data,
            out,
            chosen,
            folds,
            patient_regex,
            device=device,
            resume=resume,
            stream=stream,
            workers=workers,
            tensorboard=tensorboard,
            reading=reading,
        )
        raise typer.Exit(code)
    with TrainingProgress(chosen) as progress, joined(choose_device(device)) as ranks, _one_error(ranks):
        if linear and ranks.world_size > 1:
            raise UsageError(f"--fit {linear} under torchrun: one process fits it; start it without torchrun")
        shared: dict[str, Any] = {
            "device": device,
            "reporter": progress,
            "reading": reading,
            "patient_regex": patient_regex,
        }
        if linear:
            fitted = fit_linear(data, out, chosen, linear, **shared)
        else:
            fitted = fit(
                data,
                out,
                chosen,
                resume=resume,
                teacher=teacher,
                stream=stream,
                workers=workers,
                tensorboard=tensorboard,
                ranks=ranks,
                **shared,
            )
    if not ranks.first:
        raise typer.Exit
    best = fitted.best
    print_status(
        f"model: epoch {best.epoch}, validation frame accuracy {best.validation_frame_accuracy:.4f} "
        f"(quadrants {best.validation_patch_accuracy:.4f}); wrote {out.as_posix()}/"
    )
    if fitted.calibration:
        print_status(describe_calibration(fitted.calibration))
    print_status(f"next: {format_command('export', out.as_posix(), '--out', 'BUNDLE')}")
    raise typer.Exit(print_failures(fitted.failures, done=1))


@contextlib.contextmanager
def _one_error(ranks: Ranks) -> Iterator[None]:
    """Mute every rank but the first that fails, so that one error is printed."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        mute(not ranks.fails_first())
        raise


def _check_data(data: Path, reading: ReadOptions) -> None:
    """List the frames that training will read; print what is skipped and which names of classes are unsuitable."""
    from echoquad_runtime.storage.system_files import SkippedEntries
    from echoquad_train.data.dataset import read_classes, read_split
    from echoquad_train.data.split_folders import class_name_warnings

    skipped, classes = SkippedEntries(), read_classes(data)
    for split in ("train", "validation"):
        read_split(data, split, classes, reading, skipped=skipped)
    print_skipped(skipped)
    for warning in class_name_warnings(classes):
        print_status(f"warning: {warning}")


def _check_teacher(teacher: Path | None, settings: list[str] | tuple[()]) -> None:
    from echoquad_runtime.errors import UsageError

    if teacher and not teacher.is_dir():
        raise UsageError(f"--teacher: {teacher.as_posix()} does not exist; expected a folder of `echoquad train`")
    if not teacher and any(setting.strip().startswith("distill_") for setting in settings):
        print_status("without --teacher, distill_weight and distill_temperature have no effect")


def _check_linear(linear: str | None, *, resume: bool, epochs: int | None, teacher: Path | None) -> None:
    from echoquad_runtime.errors import UsageError

    given = {"--resume": resume, "--epochs": epochs is not None, "--teacher": teacher is not None}
    if linear and (conflicts := [name for name, is_given in given.items() if is_given]):
        raise UsageError(
            f"--fit {linear} with {', '.join(conflicts)}: a linear classifier is fitted to the labels in one step; "
            f"leave out {'it' if len(conflicts) == 1 else 'them'}, or --fit"
        )


def _check_folds(folds: int | None, teacher: Path | None, linear: str | None) -> None:
    from echoquad_runtime.errors import UsageError

    if folds is not None and linear is not None:
        raise UsageError(f"--folds with --fit {linear}: folds train networks; leave one out")
    if folds is not None and teacher is not None:
        raise UsageError(
            "--folds with --teacher: the teacher was trained on frames that the folds hold out; leave one out"
        )


def _read_options(out: Path, resume: bool, matrices: bool, flip: FlipName | None, every: int) -> ReadOptions:
    """Return the options for reading frames; a resumed run keeps its own if none is given."""
    if resume and (matrices, flip, every) == (False, None, 1):
        from echoquad_runtime.errors import RunError
        from echoquad_runtime.frames.formats import ReadOptions
        from echoquad_train.runs.checkpoint import read_info

        with contextlib.suppress(RunError):  # a missing or unfinished run is reported later
            return ReadOptions.from_record(read_info(out).get("data"))
    return read_options(matrices, flip, every)
