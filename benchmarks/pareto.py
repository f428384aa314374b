"""Accuracy out of fold against time (Pareto front): a table, a plot, and JSON with a point per recipe and precision.

    python benchmarks/pareto.py FIGURES.json [FIGURES.json ...] --out docs/reference/pareto [--recipes lite,scratch]
        [--precision fp32,int8] [--rounds 60] [--threads 2]

FIGURES.json comes from `out_of_fold.py --keep`. The run of each fold is exported, with its parity gate, and the graph
classifies the frames that the fold holds out. The time is that of one frame, from file bytes to decision, in the graph
of the first fold, after ten others; all points are timed interleaved. A recipe of which an int8 graph fails its gate
has no point, and the table says so. Writes ``OUT.md``, ``OUT.json`` and ``OUT.png``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, time_interleaved, versions
from workers.fold import joined, load_result, read_splits

from echoquad_export.packing.exporter import export_run
from echoquad_runtime.bench.benchmark import time_stages
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.errors import ParityError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data.dataset import Split
from echoquad_train.evaluation.evaluate import predict_split
from echoquad_train.evaluation.scored_frames import ScoredFrames
from echoquad_train.fitting.fold_splits import FoldSettings, split_folds
from echoquad_train.fitting.out_of_fold import ResampledFigures
from echoquad_train.runs.ensemble_folder import Ensemble, load_trained

UNTIMED = 10  # frames before the timed one


@dataclass
class Point:
    """Accuracy and cost of a recipe in a precision. `changed` are decisions unlike those of the training code."""

    name: str
    precision: str
    accuracy: float
    low: float
    high: float
    auc: float
    frames: int
    changed: int
    megabytes: float
    float_layers: int
    milliseconds: float = 0.0
    on_front: bool = False


@dataclass(frozen=True)
class FoldRun:
    """A fold's run: its folder, the frames it holds out, what the training code answers on them, the patients' rule."""

    folder: Path
    held_out: Split
    answers: ScoredFrames
    settings: FoldSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", help="labels with commas (default: all)")
    parser.add_argument("--precision", default="fp32,int8")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()

    points: list[Point] = []
    calls: dict[str, Callable[[], object]] = {}
    refused: list[str] = []
    precisions = options.precision.split(",")
    labels = options.recipes.split(",") if options.recipes else None
    recipes = [recipe for path in options.figures for recipe in read_recipes(path, labels)]
    if unknown := set(labels or ()) - {label for label, _ in recipes}:
        raise SystemExit(f"--recipes: no record has {', '.join(sorted(unknown))}")
    spawn = multiprocessing.get_context("spawn")
    # Tracing a network takes most of an export, on one core; more threads in each process would compete for the cores.
    exporters = ProcessPoolExecutor(options.threads, spawn, torch.set_num_threads, (1,))
    with tempfile.TemporaryDirectory() as work, exporters as pool:
        for number, (label, folds) in enumerate(recipes):
            name = f"{label}: {name_of(folds[0].folder)}"
            for precision, bundles in export_folds(folds, precisions, Path(work) / str(number), pool).items():
                if isinstance(bundles, str):
                    refused.append(f"{name} {precision}: {bundles}")
                    continue
                point, call = measure(name, folds, bundles, precision, options.threads)
                points.append(point)
                calls[f"{point.name} {point.precision}"] = call
                print(f"{point.name} {point.precision}: {point.accuracy:.3f}", flush=True)
        times = time_interleaved(calls, options.rounds, untimed=UNTIMED)
        for point in points:
            point.milliseconds = statistics.median(times[f"{point.name} {point.precision}"])
    mark_front(points)
    points.sort(key=lambda point: point.milliseconds)
    where = f"{machine(options.threads)}; " + ", ".join(
        f"{name} {version}" for name, version in versions("onnxruntime", "torch", "numpy", "pillow").items()
    )
    table = as_table(points)
    print(table)
    for line in refused:
        print(line)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"points": [asdict(point) for point in points], "refused": refused, "machine": where}
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    notes = [f"Failed its parity gate: {line}" for line in refused]
    notes.append(f"Median of {options.rounds} interleaved rounds, each time after {UNTIMED} untimed frames. {where}.")
    text = "\n\n".join([table, *notes])
    options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    draw(points, options.out.with_suffix(".png"), where)
    print(json.dumps(record))


def read_recipes(path: Path, labels: Sequence[str] | None = None) -> Iterator[tuple[str, list[FoldRun]]]:
    """Yield the label and the folds of each recipe in a record of `out_of_fold.py`: its first seed, all patients.

    With `labels`, only of these recipes.
    """
    runs: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["runs"]
    for label in dict.fromkeys(run["recipe"] for run in runs if not labels or run["recipe"] in labels):
        own = [run for run in runs if run["recipe"] == label]
        own = [run for run in own if run["seed"] == own[0]["seed"] and run["asked"] is None]
        results = [path.with_suffix("") / run["predictions"] for run in own]
        missing = [result for result in results if not result.with_suffix("").is_dir()]
        if missing or not own:
            raise SystemExit(f"{path}: no run folders of {label}; expected a record of `out_of_fold.py --keep`")
        trained = load_trained(results[0].with_suffix(""))
        first = (trained.members[0] if isinstance(trained, Ensemble) else trained).info
        settings = FoldSettings(own[0]["folds"], first["patient_regex"])
        folds = split_folds(read_splits(first["data"]["folder"]), settings, own[0]["seed"])
        yield (
            label,
            [
                FoldRun(result.with_suffix(""), folds[run["fold"] - 1].held_out, load_result(result)[1], settings)
                for run, result in zip(own, results, strict=True)
            ],
        )


def name_of(run: Path) -> str:
    info = load_trained(run).info
    distilled = ", distilled" if "teacher" in info else ""
    return f"{info['backbone'].removeprefix('timm:')} at {info['contract']['input_size']}{distilled}"


def export_folds(
    folds: Sequence[FoldRun], precisions: Sequence[str], work: Path, pool: Executor
) -> dict[str, list[Bundle] | str]:
    """Return the bundles of the folds for each precision, or why the first one failed its parity gate."""
    folders = [work / f"fold-{number}" for number, _ in enumerate(folds, 1)]
    done = pool.map(export_fold, [fold.folder for fold in folds], folders, repeat(tuple(precisions)))
    if not (errors := [error for error in done if error]):
        bundles = [Bundle(folder) for folder in folders]
        return dict.fromkeys(precisions, bundles)
    if len(precisions) == 1:
        return {precisions[0]: errors[0]}
    return {name: found for one in precisions for name, found in export_folds(folds, [one], work / one, pool).items()}


def export_fold(run: Path, out: Path, precisions: Sequence[str]) -> str | None:
    """Export a run; return why it failed its parity gate, if it did."""
    try:
        export_run(run, out, precisions=precisions)
    except ParityError as error:
        return str(error)
    return None


def measure(
    name: str, folds: Sequence[FoldRun], bundles: Sequence[Bundle], precision: str, threads: int
) -> tuple[Point, Callable[[], object]]:
    """Measure the accuracy out of fold; return it with the call to time: one frame, bytes to decision."""
    scored, changed, call, size, kept = [], 0, None, 0, 0
    for fold, bundle in zip(folds, bundles, strict=True):
        engine = OnnxEngine(bundle, precision=precision, device="cpu", threads=threads)
        found = predict_split(Predictor(engine), fold.held_out, fold.settings.pattern).scored
        assert found.names == fold.answers.names
        changed += int((found.decided != fold.answers.decided).sum())
        scored.append(found)
        kept = max(kept, len(bundle.manifest["precisions"][precision].get("float_layers", [])))
        if call is None:
            call, size = (
                single_frame(engine, fold.held_out),
                bundle.manifest["files"][f"model.{precision}.onnx"]["bytes"],
            )
    assert call is not None
    pooled = joined(scored)
    estimates = ResampledFigures.of([pooled]).estimates()
    accuracy, area = estimates["accuracy"], estimates["roc_auc"].estimate
    assert accuracy.estimate is not None and accuracy.ci95 is not None and area is not None
    low, high = accuracy.ci95
    return Point(name, precision, accuracy.estimate, low, high, area, len(pooled), changed, size / 1e6, kept), call


def single_frame(engine: OnnxEngine, split: Split) -> Callable[[], object]:
    encoded = [frame.path.read_bytes() for frame in split.frames[:16]]
    slots = SlotPool(engine, 1)
    batch = slots.new_batch()
    turn = 0

    def call() -> None:
        nonlocal turn
        turn += 1
        time_stages(slots, [encoded[turn % len(encoded)]], batch)

    return call


def mark_front(points: Sequence[Point]) -> None:
    """Mark the points that no other point beats in both accuracy and time."""
    for point in points:
        point.on_front = not any(
            other.accuracy >= point.accuracy
            and other.milliseconds <= point.milliseconds
            and (other.accuracy, other.milliseconds) != (point.accuracy, point.milliseconds)
            for other in points
        )


def as_table(points: Sequence[Point]) -> str:
    lines = [
        "| recipe and network | precision | frame accuracy | 95 % interval | ROC AUC | changed decisions | ms a frame "
        "| MB | best at its cost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        kept = f" ({p.float_layers} layers in float)" if p.float_layers else ""
        lines.append(
            f"| {p.name} | {p.precision}{kept} | {p.accuracy:.3f} | {p.low:.3f} to {p.high:.3f} | {p.auc:.3f} | "
            f"{p.changed} of {p.frames} | {p.milliseconds:.2f} | {p.megabytes:.1f} | {'yes' if p.on_front else ''} |"
        )
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path, where: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6.5), layout="constrained")
    names = list(dict.fromkeys(point.name for point in points))
    colours = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    markers = {"fp32": "o", "fp16": "D", "int8": "s"}
    for name in names:
        own = sorted((p for p in points if p.name == name), key=lambda p: p.milliseconds)
        axes.plot([p.milliseconds for p in own], [p.accuracy for p in own], color=colours[name], lw=1, alpha=0.5)
        for p in own:
            errors = np.array([[p.accuracy - p.low], [p.high - p.accuracy]])
            axes.errorbar(
                p.milliseconds,
                p.accuracy,
                errors,
                marker=markers.get(p.precision, "o"),
                ms=8,
                mfc=colours[name] if p.on_front else "white",
                color=colours[name],
                elinewidth=0.6,
                capsize=2,
                label=f"{p.name}, {p.precision}",
            )
    front = sorted((p for p in points if p.on_front), key=lambda p: p.milliseconds)
    axes.step([p.milliseconds for p in front], [p.accuracy for p in front], "k--", where="post", lw=0.8)
    axes.set_xscale("log")
    ticks = (1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 80, 100, 150, 200)
    low, high = axes.get_xlim()
    axes.set_xticks([t for t in ticks if low <= t <= high], [str(t) for t in ticks if low <= t <= high])
    axes.minorticks_off()
    axes.set_xlabel("milliseconds per frame, from file bytes to decision (median)")
    axes.set_ylabel(f"frame accuracy out of fold, {points[0].frames} frames (95 % interval by patient)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    figure.suptitle("Frame accuracy against time; filled: on the Pareto front", fontsize=11)
    axes.set_title(where, fontsize=6)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
