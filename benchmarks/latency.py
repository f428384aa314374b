"""Latency of a live source at 30 and 60 frames per second: stages, bursts, sustained load, and thread spinning.

    python benchmarks/latency.py BUNDLE [--frames FOLDER] [--precision int8] [--seconds 10] [--minutes 10]

The latency of a frame is the time from when it is due, as an encoded file in memory, to its decision. No frame is
dropped, so a late frame delays the next ones. A deadline is missed if the decision comes after the next frame is due.
CPU usage is that of the process, overall and while it waits for a frame. Stages are timed in a separate run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import FORMATS, PAUSE, arguments, make_frames, quantiles, report, rotated

from echoquad_runtime.bench.benchmark import STAGES, time_stages
from echoquad_runtime.bench.live_source import LiveRun, run_live
from echoquad_runtime.bench.peak_memory import peak_rss_mb
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.onnx_header import INPUT, OUTPUTS
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.predict.predictor import Predictor

BURST = 32  # frames that arrive at once
SUSTAINED_FPS = 30.0
HEADER = ["", "p50 ms", "p95 ms", "p99 ms", "max ms", "missed", "cores", "idle CPU %"]


class OrtOwn:
    """A session with onnxruntime's default options except for the number of threads; its threads spin."""

    device, note = "cpu", ""

    def __init__(self, bundle: Bundle, precision: str, threads: int) -> None:
        onnxruntime = load_onnxruntime()
        self.contract, self.precision = bundle.contract, precision
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(bundle.read_model(precision), options)

    def infer(self, quadrants: np.ndarray) -> tuple[FloatArray, FloatArray]:
        logits, probabilities = self._session.run(OUTPUTS, {INPUT: quadrants})
        return logits, probabilities


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--format", choices=list(FORMATS), default="rgb-png")
    parser.add_argument(
        "--precision", help="comma-separated, such as fp32,int8 (default: those of the bundle without fp16)"
    )
    parser.add_argument("--fps", default="30,60", help="frames per second of the source (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="duration of live runs, in --rounds parts (default %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=int, default=0, help="duration of a sustained run at 30 frames per second (default: none)"
    )
    options = parser.parse_args()

    bundle = Bundle(options.bundle)
    precisions = (options.precision or ",".join(name for name in bundle.precisions if name != "fp16")).split(",")
    with tempfile.TemporaryDirectory() as work:
        files = make_frames(Path(work), options.format, options.count, options.frames)
        encoded = [path.read_bytes() for path in files]
    rows, record = [HEADER], dict[str, Any]()
    for precision in precisions:
        record[precision] = found = measure(bundle, precision, encoded, options)
        rows += table(precision, found)
    note = (
        f"Live runs of {options.seconds:g} seconds in {options.rounds} interleaved parts, frames of 800x600, "
        f"{options.format}. Cores is CPU time over wall time of the process; idle CPU is the same while it waits for a "
        "frame, in percent of one core."
    )
    report("latency", rows, record, options.results, threads=options.threads, notes=[note])


def measure(bundle: Bundle, precision: str, encoded: Sequence[bytes], options: Any) -> dict[str, Any]:
    threads = options.threads
    chosen = {"precision": precision, "device": "cpu", "threads": threads}
    own = Predictor(bundle, **chosen)
    predictors = {
        "in all": own,
        "in all, not spinning": Predictor(bundle, **chosen, spinning=False),
        "in all, onnxruntime's own spinning": Predictor(OrtOwn(bundle, precision, threads)),
    }
    found: dict[str, Any] = {"live": {}}
    for fps in map(float, options.fps.split(",")):
        count = max(1, round(fps * options.seconds / options.rounds))
        found["live"][f"{fps:g}"] = stages(own, encoded, fps, count * options.rounds)
        taken: dict[str, list[LiveRun]] = {name: [] for name in predictors}
        for turn in range(options.rounds):
            for name in rotated(list(predictors), turn):
                taken[name].append(live(predictors[name], encoded, fps, count))
        found["live"][f"{fps:g}"] |= {name: described(runs) for name, runs in taken.items()}
    found["burst"] = burst(own, encoded, options.rounds)
    found["sustained"] = sustained(own, encoded, options.minutes)
    return found


def stages(predictor: Predictor, encoded: Sequence[bytes], fps: float, count: int) -> dict[str, Any]:
    """Return quantiles of each stage over a live run."""
    slots = predictor.slots(concurrent=False)
    batch = slots.new_batch()
    taken: list[list[float]] = []
    run_live(lambda i: taken.append(time_stages(slots, [encoded[i % len(encoded)]], batch)), fps, count)
    columns = zip(STAGES, zip(*taken, strict=True), strict=True)
    return {name: quantiles([1e3 * one for one in column]) for name, column in columns}


def live(predictor: Predictor, encoded: Sequence[bytes], fps: float, count: int) -> LiveRun:
    time.sleep(PAUSE)
    for index in range(5):
        predictor(encoded[index % len(encoded)])
    return run_live(lambda index: predictor(encoded[index % len(encoded)]), fps, count)


def described(runs: Sequence[LiveRun]) -> dict[str, Any]:
    """Return quantiles over all runs, and the mean CPU usage of the runs."""
    latencies = [1e3 * one for paced in runs for one in paced.latencies]
    idle = [100 * paced.idle_cpu for paced in runs if paced.idle_cpu is not None]
    return {
        **quantiles(latencies),
        "frames": len(latencies),
        "missed": sum(paced.missed for paced in runs),
        "cpu_cores": statistics.fmean(paced.cpu_cores for paced in runs),
        "idle_cpu_percent": statistics.fmean(idle) if idle else None,
    }


def burst(predictor: Predictor, encoded: Sequence[bytes], rounds: int) -> dict[str, Any]:
    """Predict `BURST` frames at once, `rounds` times; return times of the decisions, and of the last one."""
    times: list[float] = []
    drained: list[float] = []
    for turn in range(rounds + 1):  # the first round opens the worker pool
        time.sleep(0.2)
        begin = time.perf_counter()
        ends = []
        for result in predictor.predict_encoded((str(i), encoded[i % len(encoded)]) for i in range(BURST)):
            if isinstance(result, Failure):
                raise SystemExit(f"{result.file}: {result.error}")
            ends.append(1e3 * (time.perf_counter() - begin))
        if turn:
            times += ends
            drained.append(ends[-1])
    return {**quantiles(times), "frames": BURST, "drained_ms": statistics.median(drained)}


def sustained(predictor: Predictor, encoded: Sequence[bytes], minutes: int) -> list[dict[str, Any]]:
    """Run at 30 frames per second; return figures for each minute."""
    found = []
    for _ in range(minutes):
        one = live(predictor, encoded, SUSTAINED_FPS, round(60 * SUSTAINED_FPS))
        found.append({**described([one]), "peak_rss_mb": peak_rss_mb()})
    return found


def table(precision: str, found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for fps, runs in found["live"].items():
        rows += [row(f"{precision}, {fps}/s: {name}", one) for name, one in runs.items()]
    one = found["burst"]
    drained = f"{precision}: burst of {one['frames']}, drained in {one['drained_ms']:.0f} ms"
    rows.append(row(drained, one))
    if minutes := found["sustained"]:
        rows.append(row(f"{precision}: sustained, minute 1", minutes[0]))
        rows.append(row(f"{precision}: sustained, minute {len(minutes)}", minutes[-1]))
        worst = max(range(len(minutes)), key=lambda index: minutes[index]["p99"])
        rows.append(row(f"{precision}: sustained, worst minute, {worst + 1}", minutes[worst]))
    return rows


def row(name: str, one: dict[str, Any]) -> list[str]:
    cells = [name, *(f"{one[key]:.2f}" for key in ("p50", "p95", "p99", "max"))]
    if "missed" not in one:
        return [*cells, "", "", ""]
    idle = one["idle_cpu_percent"]
    missed = f"{one['missed']} of {one['frames']}"
    return [*cells, missed, f"{one['cpu_cores']:.2f}", "" if idle is None else f"{idle:.1f}"]


if __name__ == "__main__":
    main()
