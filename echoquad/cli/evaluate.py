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
    Matrices,
    Method,
    Precision,
    Threads,
    TorchDeviceName,
    reading_of,
)

if TYPE_CHECKING:
    from echoquad_runtime.kinds import Reading
    from echoquad_runtime.predictor import Predictor

__all__ = ["evaluate", "summarize"]


def evaluate(
    model: Annotated[Path, Argument(metavar="RUN_OR_BUNDLE", help="A run (torch) or a bundle (onnxruntime).")],
    data: Annotated[Path, Argument(metavar="DATA", help="Folder with SPLIT/CLASS/**/*.png|jpg|...")],
    out: Annotated[Path, Option("--out", metavar="DIR", help="Folder for metrics, predictions and figures.")],
    split: Annotated[
        str, Option("--split", metavar="NAME", help="Folder of DATA: train, validation or test.")
    ] = "test",
    method: Method = None,
    device: Device = DeviceName.auto,
    precision: Precision = None,
    batch_size: BatchSize = 8,
    threads: Threads = None,
    matrices: Matrices = False,
    flip: Flip = None,
    every: Every = 1,
) -> None:
    """Measure a run or a bundle on a labelled split."""
    from echoquad_runtime.errors import RunError

    if not model.is_dir():
        raise RunError(f"{model.as_posix()}: no such folder; expected a run or a bundle; check the path")
    from echoquad_train import evaluate as evaluation
    from echoquad_train.dataset import read_split

    predictor = _predictor(model, device, precision, threads, method, batch_size)
    trained = _trained(model)
    reading = reading_of(matrices or trained.matrices, flip, every, trained)
    frames = read_split(data, split, predictor.contract.classes, reading)
    note(f"{split}: {len(frames.frames)} frames on {predictor.engine.device} in {predictor.engine.precision}")
    with Progress("evaluating", len(frames.frames)) as progress:
        found = evaluation.evaluate(predictor, frames, progress=progress.update)
    paths = evaluation.write_evaluation(found, out)
    say(summarize(found.metrics))
    note(f"wrote {', '.join(path.as_posix() for path in paths)}")
    raise SystemExit(list_failures(found.failures, done=len(found.predictions)))


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
    return "\n".join(
        [
            f"frame accuracy {metrics['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), "
            f"{metrics['frames']} frames",
            f"ROC AUC        {auc}",
            f"quadrants      {quadrants}",
            "",
            table(["class", "precision", "recall", "F1", "frames", *(f"as {name}" for name in classes)], rows),
        ]
    )


def _trained(model: Path) -> Reading:
    """Find how the data were read that a run or a bundle was trained on."""
    from echoquad_runtime.bundle import MANIFEST, Bundle
    from echoquad_runtime.kinds import Reading

    if (model / MANIFEST).exists():
        return Reading.found_in(Bundle(model).manifest["training"])
    from echoquad_train.checkpoint import read_info

    return Reading.found_in(read_info(model).get("data"))


def _predictor(
    model: Path, device: DeviceName, precision: str | None, threads: int | None, method: Any, batch_size: int
) -> Predictor:
    from echoquad_runtime.bundle import MANIFEST
    from echoquad_runtime.errors import RunError, UsageError
    from echoquad_runtime.predictor import Predictor

    rule = method.value if method else None
    if (model / MANIFEST).exists():
        bundled = Predictor(
            model,
            device=device.value,
            precision=precision,
            threads=threads,
            method=rule,
            batch_size=batch_size,
        )
        note(bundled.engine.note or f"bundle {model.as_posix()}")
        return bundled

    from echoquad_train.checkpoint import RUN, load_run
    from echoquad_train.device import choose_device
    from echoquad_train.engine import TorchEngine

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
    run = load_run(model)
    engine = TorchEngine(run.model, run.contract, choose_device(TorchDeviceName(device).value))
    return Predictor(engine, method=rule, batch_size=batch_size)
