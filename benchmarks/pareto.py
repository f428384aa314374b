"""Accuracy against time (Pareto front): a table, a plot and a line of JSON with a point per run and precision.

    python benchmarks/pareto.py RUN [RUN ...] --out docs/reference/pareto [--precision fp32,int8] [--rounds 60]
        [--threads 2]

Each run is exported, with its parity gate, and the exported graph classifies the validation frames of the run's data.
The time is that of one frame, from file bytes to decision; all points are timed interleaved. An int8 graph that fails
its gate has no point, and the table says so. Writes ``OUT.md``, ``OUT.json`` and ``OUT.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from common import alternate, machine, versions

from echoquad_export.packing.exporter import export_run
from echoquad_runtime.bench.benchmark import time_stages
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.errors import ParityError
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data.dataset import read_split
from echoquad_train.evaluation.intervals import wilson_interval
from echoquad_train.runs.checkpoint import load_run


@dataclass
class Point:
    """Accuracy and cost of one graph."""

    name: str
    precision: str
    accuracy: float
    low: float
    high: float
    frames: int
    megabytes: float
    float_layers: int
    milliseconds: float = 0.0
    on_front: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", default="fp32,int8")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()

    points: list[Point] = []
    calls: dict[str, Callable[[], object]] = {}
    refused: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        for run in options.runs:
            for precision in options.precision.split(","):
                folder = Path(work) / f"{run.name}.{precision}"
                try:
                    export_run(run, folder, precisions=(precision,))
                except ParityError as error:
                    refused.append(f"{name_of(run)} {precision}: {error}")
                    continue
                point, call = measure(run, folder, options.threads)
                points.append(point)
                calls[f"{point.name} {point.precision}"] = call
                print(f"{point.name} {point.precision}: {point.accuracy:.3f}", flush=True)
        for key, median in alternate(calls, options.rounds).items():
            next(point for point in points if f"{point.name} {point.precision}" == key).milliseconds = median
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
    text = "\n\n".join([table, *notes, f"Median of {options.rounds} interleaved rounds. {where}."])
    options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    draw(points, options.out.with_suffix(".png"), where)
    print(json.dumps(record))


def name_of(run: Path) -> str:
    info = load_run(run).info
    teacher = info.get("teacher")
    distilled = f", distilled from {teacher['backbone']} at {teacher['input_size']}" if teacher else ""
    return f"{info['backbone']} at {info['contract']['input_size']}{distilled}"


def measure(run: Path, folder: Path, threads: int) -> tuple[Point, Callable[[], object]]:
    """Measure the accuracy on the validation frames; return it with the call to time: one frame, bytes to decision."""
    bundle = Bundle(folder)
    precision = bundle.default_precision
    engine = OnnxEngine(bundle, device="cpu", threads=threads)
    contract = bundle.contract
    split = read_split(Path(load_run(run).info["data"]["folder"]), "validation", contract.classes)
    right = 0
    for frame, result in zip(split.frames, Predictor(engine).predict(split.files()), strict=True):
        assert isinstance(result, Prediction), result
        right += result.label == contract.classes[frame.label]
    count = len(split.frames)
    low, high = wilson_interval(right, count)
    encoded = [frame.path.read_bytes() for frame in split.frames[:16]]
    slots = SlotPool(engine, 1)
    batch = slots.new_batch()
    turn = 0

    def call() -> None:
        nonlocal turn
        turn += 1
        time_stages(slots, [encoded[turn % len(encoded)]], batch)

    size = bundle.manifest["files"][f"model.{precision}.onnx"]["bytes"] / 1e6
    kept = len(bundle.manifest["precisions"][precision].get("float_layers", []))
    return Point(name_of(run), precision, right / count, low, high, count, size, kept), call


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
        "| network | precision | frame accuracy | 95 % interval | ms a frame | MB | best at its cost |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in points:
        kept = f" ({p.float_layers} layers in float)" if p.float_layers else ""
        lines.append(
            f"| {p.name} | {p.precision}{kept} | {p.accuracy:.3f} | {p.low:.3f} to {p.high:.3f} | "
            f"{p.milliseconds:.2f} | {p.megabytes:.1f} | {'yes' if p.on_front else ''} |"
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
    axes.set_ylabel(f"frame accuracy on {points[0].frames} validation frames (95 % interval)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    figure.suptitle("Frame accuracy against time; filled: on the Pareto front", fontsize=11)
    axes.set_title(where, fontsize=6)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
