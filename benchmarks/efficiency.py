"""Efficiency of `predict` from files to CSV, relative to an ideal on all cores; and of the engine over `session.run`.

    python benchmarks/efficiency.py BUNDLE [--frames FOLDER] [--precision fp32,int8] [--results benchmarks/RESULTS.md]

Decoding, quadrants and inference are measured separately on one core. Cores / (the sum of the three) is the upper bound
of frames per second: no loss in queues, ordering, votes and CSV, and no slowdown between cores. "Bare threads" runs the
same three stages in plain threads, without ordering and output, and shows the loss due to the machine. "Engine alone"
compares an inference slot with `session.run` on prepared batches.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import FORMATS, PAUSE, alternate, arguments, make_frames, one_core, report
from workers.peer import Setup, echoquad

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.onnx_header import INPUT, OUTPUTS
from echoquad_runtime.devices.session_factory import open_session
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.frames.quality_flags import quality_flags
from echoquad_runtime.frames.reader import read_checked
from echoquad_runtime.quadrants import frame_quadrants

AIM, ENGINE_AIM = 0.90, 0.97
STAGES = ("decode", "quadrants", "inference")
CONSECUTIVE = 8  # frames per timed call; with a single one, the wake-up of threads would dominate
SLOTS = ((1, 1), (1, 8), (None, 1))  # threads (None: all) and frames: worker of a folder, batches, live frame


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--format", choices=list(FORMATS), default="rgb-png")
    parser.add_argument(
        "--precision", help="comma-separated, such as fp32,int8 (default: those of the bundle without fp16)"
    )
    options = parser.parse_args()

    bundle = Bundle(options.bundle)
    precisions = (options.precision or ",".join(name for name in bundle.precisions if name != "fp16")).split(",")
    setup = Setup(Path(), options.bundle, options.threads)
    rows = [["", "ms a frame", "CPU ms a frame", "frames/s", "share", "aim"]]
    record: dict[str, Any] = {"frames": options.count, "rounds": options.rounds, "kind": options.format}
    with tempfile.TemporaryDirectory() as work:
        files = make_frames(Path(work) / "frames", options.format, options.count, options.frames)
        for precision in precisions:
            found = pipeline(setup, precision, files, Path(work), options.rounds)
            slots = engine_alone(bundle, precision, options.threads, options.rounds)
            rows += table(precision, found, slots)
            record[precision] = {"pipeline": found, "engine": slots}
    note = (
        f"Medians of {options.rounds} alternating rounds over {options.count} frames of 800x600, {options.format}, "
        f"{options.threads} threads. The share of a pass is its frames per second over the bound of the same round. "
        "Other work on the machine lengthens wall time but not CPU time."
    )
    report("efficiency", rows, record, options.results, threads=options.threads, notes=[note])


def pipeline(setup: Setup, precision: str, files: Sequence[Path], work: Path, rounds: int) -> dict[str, Any]:
    """Time the stages alone, plain threads, and EchoQuad, interleaved."""
    contract, threads, count = setup.contract, setup.threads, len(files)
    slots = SlotPool(OnnxEngine(setup.bundle, precision=precision, device="cpu", threads=1), 1)
    make_pass = echoquad(setup, precision=precision)
    batches = np.zeros((count, 1, 4, 1, contract.input_size, contract.input_size), np.uint8)
    greys = [read_checked(path)[0] for path in files]

    def decode(index: int) -> None:
        greys[index] = read_checked(files[index])[0]

    def cut(index: int) -> None:
        frame_quadrants(greys[index], contract, out=batches[index, 0])
        quality_flags(batches[index, 0])

    stages = dict(zip(STAGES, (decode, cut, lambda index: slots.run(batches[index], 1)), strict=True))

    def run_stages(share: Sequence[int]) -> None:
        for index in share:
            for stage in stages.values():
                stage(index)

    times: dict[str, list[float]] = {name: [] for name in (*STAGES, "bound", "bare", "product")}
    cpus: dict[str, list[float]] = {name: [] for name in times}
    with ThreadPoolExecutor(threads) as pool:
        shares = [range(first, count, threads) for first in range(threads)]
        for turn in range(rounds + 1):  # the first round is a warm-up
            with one_core():
                alone = {name: clocked(lambda s=stage: [s(i) for i in range(count)]) for name, stage in stages.items()}
            bare = clocked(lambda: list(pool.map(run_stages, shares)))
            product = clocked(partial(make_pass, files, work / f"{precision}-{turn}.csv"))
            if turn:
                walls, works = zip(*alone.values(), strict=True)
                bound = sum(walls) / threads, sum(works)
                for name, (wall, cpu) in {**alone, "bound": bound, "bare": bare, "product": product}.items():
                    times[name].append(wall)
                    cpus[name].append(cpu)
    return {
        "stage_ms": {name: 1e3 * statistics.median(times[name]) / count for name in STAGES},
        "cpu_ms": {name: 1e3 * statistics.median(found) / count for name, found in cpus.items()},
        "bound_fps": count / statistics.median(times["bound"]),
        "bare_threads_fps": count / statistics.median(times["bare"]),
        "fps": count / statistics.median(times["product"]),
        "share": share_of(times["bound"], times["product"]),
        "bare_threads_share": share_of(times["bound"], times["bare"]),
    }


def share_of(bound: Sequence[float], taken: Sequence[float]) -> float:
    """Return the median over the rounds of the ideal time over the measured time."""
    return statistics.median(least / one for least, one in zip(bound, taken, strict=True))


def clocked(call: Callable[[], object]) -> tuple[float, float]:
    """Return the wall seconds of a call and the CPU seconds of the process."""
    time.sleep(PAUSE)
    begin, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin, time.process_time() - cpu


def engine_alone(bundle: Bundle, precision: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Time an inference slot against `session.run`, on sessions with equal options."""
    size, found = bundle.contract.input_size, []
    for wanted, frames in SLOTS:
        count = wanted or threads
        engine = OnnxEngine(bundle, precision=precision, device="cpu", threads=count)
        slots = SlotPool(engine, frames)
        session = open_session(bundle.read_model(precision), device="cpu", threads=count).session
        runs = CONSECUTIVE // frames
        batch = np.random.default_rng(0).integers(0, 256, (4 * frames, 1, size, size), np.uint8)
        frames_of_it = batch.reshape(frames, 4, 1, size, size)
        calls = {
            "bare": lambda s=session, b=batch, runs=runs: [s.run(OUTPUTS, {INPUT: b}) for _ in range(runs)],
            "engine": lambda s=slots, b=frames_of_it, runs=runs: [s.run(b, len(b)) for _ in range(runs)],
        }
        medians = {name: ms / runs for name, ms in alternate(calls, rounds).items()}
        found.append({"threads": count, "frames": frames, **medians, "share": medians["bare"] / medians["engine"]})
    return found


def table(precision: str, found: dict[str, Any], slots: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [
        [f"{precision}: {name}, one core", f"{ms:.2f}", f"{found['cpu_ms'][name]:.2f}", f"{1e3 / ms:.1f}", "", ""]
        for name, ms in found["stage_ms"].items()
    ]
    for name, key, fps, share, aim in (
        ("bound: cores / sum", "bound", found["bound_fps"], 1.0, ""),
        ("bare threads", "bare", found["bare_threads_fps"], found["bare_threads_share"], ""),
        ("EchoQuad, files to CSV", "product", found["fps"], found["share"], f"{AIM:.2f}"),
    ):
        cpu = f"{found['cpu_ms'][key]:.2f}"
        rows.append([f"{precision}: {name}", f"{1e3 / fps:.2f}", cpu, f"{fps:.1f}", f"{share:.3f}", aim])
    for slot in slots:
        ms = slot["engine"] / slot["frames"]
        name = f"{precision}: engine alone, {slot['threads']} thread(s), {slot['frames']} frame(s) a run"
        rows.append([name, f"{ms:.2f}", "", f"{1e3 / ms:.1f}", f"{slot['share']:.3f}", f"{ENGINE_AIM:.2f}"])
    return rows


if __name__ == "__main__":
    main()
