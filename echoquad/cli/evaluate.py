"""``echoquad evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from echoquad.cli.console import Progress, list_failures, note, say, table
from echoquad.cli.declare import Argument, Option
from echoquad.cli.options import (
    BatchSize,
    Device,
    DeviceName,
    Every,
    Flip,
    FlipName,
    Matrices,
    Method,
    Precision,
    Threads,
    TorchDeviceName,
    reading_of,
)

if TYPE_CHECKING:
    import re

    from echoquad_runtime.frames.formats import ReadOptions
    from echoquad_runtime.predict.predictor import Predictor
    from echoquad_train.evaluation.evaluate import Evaluation
    from echoquad_train.evaluation.metrics import EvaluationOptions

__all__ = ["evaluate", "summarize", "summarize_pair"]


def evaluate(
    model: Annotated[
        Path, Argument(metavar="RUN_OR_BUNDLE", help="A run or ensemble (torch), or a bundle (onnxruntime).")
    ],
    rest: Annotated[
        list[Path],
        Argument(
            metavar="[OTHER] DATA",
            help="Folder with SPLIT/CLASS/**/*.png|jpg|...; before it, if at all, a second run or bundle to compare "
            "with the first on the same frames.",
        ),
    ],
    out: Annotated[Path, Option("--out", metavar="DIR", help="Folder for metrics, predictions, figures and report.")],
    split: Annotated[
        str, Option("--split", metavar="NAME", help="Folder of DATA: train, validation or test.")
    ] = "test",
    threshold_from: Annotated[
        Path | None,
        Option(
            "--threshold-from",
            metavar="DATA",
            help="Choose thresholds on the validation split of this folder; that of DATA where not given. They are "
            "never chosen on the patients that they are reported on.",
        ),
    ] = None,
    at_specificity: Annotated[
        list[float] | None,
        Option(
            "--at-specificity",
            metavar="RATE",
            help="Operating point: sensitivity at this specificity; 0.9 if not given.",
        ),
    ] = None,
    at_sensitivity: Annotated[
        list[float] | None,
        Option(
            "--at-sensitivity",
            metavar="RATE",
            help="Operating point: specificity at this sensitivity; 0.9 if not given.",
        ),
    ] = None,
    abstain_below: Annotated[
        float | None,
        Option(
            "--abstain-below", metavar="P", help="Also measure what predict with this option would leave undecided."
        ),
    ] = None,
    patient_regex: Annotated[
        str | None,
        Option(
            "--patient-regex",
            metavar="REGEX",
            help="Whom a frame is of: its first group, found in the name; what names like patient0001_4CH, ASD3-101 "
            "and NORMS-39 say where not given.",
        ),
    ] = None,
    bootstrap: Annotated[
        int, Option("--bootstrap", metavar="N", min=0, help="Resamples of patients for the intervals; 0 is none.")
    ] = 1000,
    seed: Annotated[int, Option("--seed", metavar="N", min=0, help="Seed of the resamples.")] = 0,
    gallery: Annotated[
        int, Option("--gallery", metavar="N", min=0, help="Draw the N most confident mistakes into DIR/mistakes.")
    ] = 12,
    method: Method = None,
    device: Device = DeviceName.auto,
    precision: Precision = None,
    batch_size: BatchSize = 8,
    threads: Threads = None,
    matrices: Matrices = False,
    flip: Flip = None,
    every: Every = 1,
) -> None:
    """Measure a run or a bundle on a labelled split, or two of them against each other.

    DIR/report.html holds all of it, opens offline, and is as private as the frames are.
    """
    from echoquad_runtime.errors import RunError, UsageError

    *others, data = rest
    models = [model, *others]
    if len(models) > 2:
        raise UsageError(f"{len(models)} models found before {data.as_posix()}; expected one, or two to compare")
    for folder in models:
        if not folder.is_dir():
            raise RunError(f"{folder.as_posix()}: no such folder; expected a run or a bundle; check the path")
    from echoquad_train.data.patients import patient_pattern
    from echoquad_train.evaluation.metrics import EvaluationOptions
    from echoquad_train.evaluation.operating_points import check_targets
    from echoquad_train.reporting.evaluation_folder import write_evaluation

    check_targets(at_specificity or (), "--at-specificity")
    check_targets(at_sensitivity or (), "--at-sensitivity")
    options = EvaluationOptions(
        bootstrap, seed, tuple(at_specificity or (0.9,)), tuple(at_sensitivity or (0.9,)), abstain_below
    )
    pattern = patient_pattern(patient_regex)
    found = []
    for folder in models:
        predictor = _predictor(folder, device, precision, threads, method, batch_size, abstain_below)
        reading = _reading(folder, matrices, flip, every)
        found.append(_measure(predictor, folder, data, reading, split, threshold_from, options, pattern))
    if len(found) > 1:
        from echoquad_train.reporting.comparison import compare, write_comparison

        compared = compare(found[0], found[1], options)
        paths = write_comparison(found[0], found[1], compared, out, gallery=gallery)
        say("\n\n".join([*(summarize(one.metrics.to_dict()) for one in found), summarize_pair(compared.to_dict())]))
    else:
        paths = write_evaluation(found[0], out, gallery=gallery)
        say(summarize(found[0].metrics.to_dict()))
    note(f"wrote {', '.join(path.as_posix() for path in paths)}")
    failures = {failure.file: failure for one in found for failure in one.failures}
    raise SystemExit(list_failures(list(failures.values()), done=min(len(one.predictions) for one in found)))


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
    """Evaluate one model, with thresholds from validation frames where there are any beside those reported."""
    from dataclasses import replace

    from echoquad_train.data.dataset import read_split
    from echoquad_train.evaluation import evaluate as evaluation

    classes = predictor.contract.classes
    frames = read_split(data, split, classes, reading)
    source = threshold_from or data
    same = split == "validation" and source.resolve() == data.resolve()
    wanted = not same and (threshold_from is not None or (source / "validation").is_dir())
    reference = read_split(source, "validation", classes, reading) if wanted else None
    count = len(frames.frames) + (len(reference.frames) if reference else 0)
    also = f" and {len(reference.frames)} of validation for the thresholds" if reference else ""
    note(f"{split}: {len(frames.frames)} frames{also} on {predictor.engine.device} in {predictor.engine.precision}")
    told = {**evaluation.model_facts(folder), "data": data.as_posix()}
    trained = told["trained_calibration"]
    given = isinstance(trained, dict) and trained.get("temperature_given") is True
    options = replace(options, temperature_given=given)
    with Progress("evaluating", count) as progress:
        found = evaluation.evaluate(
            predictor, frames, options=options, reference=reference, pattern=pattern, progress=progress.update
        )
    return replace(found, metrics=replace(found.metrics, **told))


def summarize(metrics: dict[str, Any]) -> str:
    """Lay out the metrics for a terminal."""
    low, high = metrics["accuracy_ci95"]
    auc = "none, a class has no frame" if metrics["roc_auc"] is None else f"{metrics['roc_auc']:.4f}"
    classes = metrics["classes"]
    rows = [
        [
            name,
            *(f"{metrics['per_class'][name][figure]:.4f}" for figure in ("precision", "recall", "f1")),
            str(metrics["per_class"][name]["support"]),
            *(str(count) for count in metrics["confusion"][index]),
        ]
        for index, name in enumerate(classes)
    ]
    quadrants = "  ".join(f"{name} {value:.4f}" for name, value in metrics["per_quadrant"].items())
    patients, calibration = metrics["patients"], metrics["calibration"]
    ece = f"{calibration['reported']['ece']:.4f} as reported"
    if refitted := calibration["refitted"]:
        ece += f", {refitted['ece']:.4f} "
        ece += "cross-fitted by patient" if "temperatures" in refitted else "under temperatures from validation"
    points = [_point_line(point) for point in metrics["operating_points"] if point["sensitivity"]]
    abstained = []
    if at := metrics["abstention"].get("at"):
        accuracy = at["accuracy"]["estimate"]
        share = "none decided" if accuracy is None else f"accuracy {accuracy:.4f}{_bounds(at['accuracy']['ci95'])}"
        abstained = [f"abstaining     below {at['below']:g}: coverage {at['coverage']['estimate']:.4f}, {share}"]
    return "\n".join(
        [
            f"frame accuracy {metrics['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), "
            f"{metrics['frames']} frames",
            f"ROC AUC        {auc}{_bounds(metrics['intervals']['roc_auc']['ci95'])}",
            f"quadrants      {quadrants}",
            f"by patient     {patients['accuracy']:.4f}{_bounds(patients['intervals']['accuracy']['ci95'])}, "
            f"{patients['count']} decisions, one a {patients['unit']}",
            f"ECE            {ece}",
            *points,
            *abstained,
            "",
            table(["class", "precision", "recall", "F1", "frames", *(f"as {name}" for name in classes)], rows),
        ]
    )


def summarize_pair(found: dict[str, Any]) -> str:
    """Lay out a comparison for a terminal."""
    difference = found["difference"]["accuracy"]
    return "\n".join(
        [
            table(
                ["frames", "B right", "B wrong"],
                [
                    ["A right", str(found["both_right"]), str(found["first_only"])],
                    ["A wrong", str(found["second_only"]), str(found["both_wrong"])],
                ],
            ),
            f"McNemar's exact test p = {found['mcnemar_p']:.4g}; accuracy A less B {difference['estimate']:+.4f}"
            f"{_bounds(difference['ci95'])}",
        ]
    )


def _point_line(point: dict[str, Any]) -> str:
    fixed = point["fixed"]
    other = "sensitivity" if fixed == "specificity" else "specificity"
    reached, found = point[fixed]["estimate"], point[other]["estimate"]
    if reached is None or found is None:
        return f"at {fixed} {point['target']:g}: no frame of one of the two kinds"
    words = f"{other} {found:.4f}{_bounds(point[other]['ci95'])}, {fixed} reached {reached:.4f}"
    return f"at {fixed} {point['target']:g}: {words}"


def _bounds(values: list[float] | None) -> str:
    return "" if values is None else f" ({values[0]:.4f} to {values[1]:.4f})"


def _reading(model: Path, matrices: bool, flip: FlipName | None, every: int) -> ReadOptions:
    """Settle how frames are read: as told, else as the data were that a run or a bundle was trained on."""
    from echoquad_runtime.bundle.bundle import MANIFEST, Bundle
    from echoquad_runtime.frames.formats import ReadOptions

    if (model / MANIFEST).exists():
        trained = ReadOptions.found_in(Bundle(model).manifest["training"])
    else:
        from echoquad_train.runs.checkpoint import read_info

        trained = ReadOptions.found_in(read_info(model).get("data"))
    return reading_of(matrices or trained.matrices, flip, every, trained)


def _predictor(
    model: Path,
    device: DeviceName,
    precision: str | None,
    threads: int | None,
    method: Any,
    batch_size: int,
    abstain_below: float | None = None,
) -> Predictor:
    from echoquad_runtime.bundle.bundle import MANIFEST
    from echoquad_runtime.errors import RunError, UsageError
    from echoquad_runtime.predict.predictor import Predictor

    rule = method.value if method else None
    if (model / MANIFEST).exists():
        bundled = Predictor(
            model,
            device=device.value,
            precision=precision,
            threads=threads,
            method=rule,
            batch_size=batch_size,
            abstain_below=abstain_below,
        )
        note(bundled.engine.note or f"bundle {model.as_posix()}")
        return bundled

    from echoquad_train.networks.device import choose_device
    from echoquad_train.networks.torch_engine import TorchEngine
    from echoquad_train.runs.checkpoint import RUN
    from echoquad_train.runs.ensemble_folder import Ensemble, load_trained

    if not (model / RUN).exists():
        raise RunError(f"{model.as_posix()}: neither a run ({RUN}) nor a bundle ({MANIFEST}) is here; check the path")
    if precision not in (None, TorchEngine.precision):
        raise UsageError(
            f"--precision {precision}: a run is evaluated in {TorchEngine.precision}; export it for others"
        )
    if device is DeviceName.openvino:
        raise UsageError("--device openvino: a run is evaluated by torch, on cpu or cuda; export it for openvino")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    run = load_trained(model)
    if isinstance(run, Ensemble) and run.trained_in_folds:
        note(f"of train and validation most members have learned, so figures on them flatter; out-of-fold: {RUN}")
    engine = TorchEngine(run.model, run.contract, choose_device(TorchDeviceName(device).value))
    return Predictor(engine, method=rule, batch_size=batch_size, abstain_below=abstain_below)
