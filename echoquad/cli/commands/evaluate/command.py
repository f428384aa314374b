"""The command ``echoquad evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echoquad.cli.commands.evaluate.models import evaluation_read_options, open_model
from echoquad.cli.commands.evaluate.summary import summarize, summarize_comparison
from echoquad.cli.framework.console import Progress, print_failures, print_result, print_skipped, print_status
from echoquad.cli.framework.options import (
    BatchSize,
    Device,
    Every,
    Flip,
    Matrices,
    Method,
    PatientRegex,
    Precision,
    Threads,
)

if TYPE_CHECKING:
    import re

    from echoquad_runtime.frames.formats import ReadOptions
    from echoquad_runtime.predict.predictor import Predictor
    from echoquad_train.evaluation.evaluate import Evaluation
    from echoquad_train.evaluation.metrics import EvaluationOptions

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="A run or ensemble (torch), or a bundle (onnxruntime).")
    ],
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[OTHER] DATA",
            help="Folder with SPLIT/CLASS/**/*.png|jpg|...; before it, optionally, a second run or bundle to compare "
            "with the first on the same frames.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for metrics, predictions, figures and report.")
    ],
    split: Annotated[
        str, typer.Option("--split", metavar="NAME", help="Split of DATA: train, validation or test.")
    ] = "test",
    threshold_from: Annotated[
        Path | None,
        typer.Option(
            "--threshold-from",
            metavar="DATA",
            help="Choose thresholds on the validation split of this folder. Default: that of DATA. They are never "
            "chosen on the patients that they are reported on.",
        ),
    ] = None,
    at_specificity: Annotated[
        list[float] | None,
        typer.Option(
            "--at-specificity", metavar="RATE", help="Operating point: sensitivity at this specificity. Default: 0.9."
        ),
    ] = None,
    at_sensitivity: Annotated[
        list[float] | None,
        typer.Option(
            "--at-sensitivity", metavar="RATE", help="Operating point: specificity at this sensitivity. Default: 0.9."
        ),
    ] = None,
    abstain_below: Annotated[
        float | None,
        typer.Option(
            "--abstain-below", metavar="P", help="Also measure how predict with this option abstains and decides."
        ),
    ] = None,
    patient_regex: PatientRegex = None,
    bootstrap: Annotated[
        int,
        typer.Option(
            "--bootstrap", metavar="N", min=0, help="Bootstrap resamples of patients for the intervals; 0 is none."
        ),
    ] = 1000,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the resamples.")] = 0,
    gallery: Annotated[
        int, typer.Option("--gallery", metavar="N", min=0, help="Draw the N most confident mistakes into DIR/mistakes.")
    ] = 12,
    method: Method = None,
    device: Device = "auto",
    precision: Precision = None,
    batch_size: BatchSize = 8,
    threads: Threads = None,
    matrices: Matrices = False,
    flip: Flip = None,
    every: Every = 1,
) -> None:
    """Measure a run or a bundle on a labelled split, or compare two of them.

    DIR/report.html contains all results, opens offline, and is as private as the frames are.
    """
    from echoquad_runtime.errors import RunError, UsageError

    *others, data = paths
    folders = [model, *others]
    if len(folders) > 2:
        raise UsageError(f"{len(folders)} models before {data.as_posix()}; expected one, or two to compare")
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"{folder.as_posix()}: no such folder; expected a run or a bundle; check the path")
    from echoquad_train.data.patients import patient_pattern
    from echoquad_train.evaluation.metrics import EvaluationOptions
    from echoquad_train.evaluation.operating_points import check_targets

    check_targets(at_specificity or (), "--at-specificity")
    check_targets(at_sensitivity or (), "--at-sensitivity")
    options = EvaluationOptions(
        bootstrap, seed, tuple(at_specificity or (0.9,)), tuple(at_sensitivity or (0.9,)), abstain_below
    )
    pattern = patient_pattern(patient_regex)
    found = []
    for folder in folders:
        predictor = open_model(folder, device, precision, threads, method, batch_size, abstain_below)
        reading = evaluation_read_options(folder, matrices, flip, every)
        found.append(_measure(predictor, folder, data, reading, split, threshold_from, options, pattern))
    if len(found) > 1:
        from echoquad_train.reporting.comparison import compare, write_comparison

        comparison = compare(found[0], found[1], options)
        written = write_comparison(found[0], found[1], comparison, out, gallery=gallery)
        print_result("\n\n".join([*(summarize(one.metrics) for one in found), summarize_comparison(comparison)]))
    else:
        from echoquad_train.reporting.evaluation_folder import write_evaluation

        written = write_evaluation(found[0], out, gallery=gallery)
        print_result(summarize(found[0].metrics))
    print_status(f"wrote {', '.join(path.as_posix() for path in written)}")
    failures = {failure.file: failure for one in found for failure in one.failures}
    raise typer.Exit(print_failures(list(failures.values()), done=min(len(one.predictions) for one in found)))


def _measure(
    predictor: Predictor,
    folder: Path,
    data: Path,
    reading: ReadOptions,
    split: str,
    threshold_from: Path | None,
    options: EvaluationOptions,
    pattern: re.Pattern[str] | None,
) -> Evaluation:
    """Evaluate one model; choose its thresholds on validation frames other than those reported, if there are any."""
    from dataclasses import replace

    from echoquad_runtime.storage.system_files import SkippedEntries
    from echoquad_train.data.dataset import read_split
    from echoquad_train.data.split_folders import split_folders
    from echoquad_train.evaluation import evaluate as evaluation

    classes = predictor.contract.classes
    skipped = SkippedEntries()
    frames = read_split(data, split, classes, reading, complete=False, skipped=skipped)
    source = threshold_from or data
    same = frames.name == "validation" and source.resolve() == data.resolve()
    separate = not same and (threshold_from is not None or "validation" in split_folders(source))
    reference = (
        read_split(source, "validation", classes, reading, complete=False, skipped=skipped) if separate else None
    )
    print_skipped(skipped)
    for part in (frames, reference):
        if part is not None and (absent := [name for name, count in part.counts.items() if not count]):
            print_status(
                f"{part.name}: no frame of class {', '.join(absent)}; what needs "
                f"{'it' if len(absent) == 1 else 'them'} is not measured"
            )
    count = len(frames.frames) + (len(reference.frames) if reference else 0)
    also = f" and {len(reference.frames)} of validation for the thresholds" if reference else ""
    print_status(
        f"{frames.name}: {len(frames.frames)} frames{also} on {predictor.engine.device} in {predictor.engine.precision}"
    )
    facts = {**evaluation.model_facts(folder), "data": data.as_posix()}
    trained = facts["trained_calibration"]
    given = isinstance(trained, dict) and trained.get("temperature_given") is True
    options = replace(options, temperature_given=given)
    with Progress("evaluating", count) as progress:
        found = evaluation.evaluate(
            predictor, frames, options=options, reference=reference, pattern=pattern, progress=progress.update
        )
    return replace(found, metrics=replace(found.metrics, **facts))
