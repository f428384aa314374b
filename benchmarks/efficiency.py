"""How much of what the cores could do EchoQuad does, from files to a CSV; and what is left of bare `session.run`.

    python benchmarks/efficiency.py BUNDLE [--frames FOLDER] [--precision fp32,int8] [--results benchmarks/RESULTS.md]

Decode, quadrants and inference are each measured alone on one core. Cores / (the sum of the three) is the bound: what
they would do if nothing were lost in queues, in order, in votes and in the CSV, and if cores did not slow each other
down. The row "bare threads" has as many plain threads going through the same three stages, without order or output: it
tells how much of the loss is the machine's. The engine alone is a slot on ready batches over `session.run` on them.
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
from common import KINDS, PAUSE, alternate, arguments, make_frames, one_core, report
from workers.peer import Setting, echoquad

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.session_factory import open_session
from echoquad_runtime.engine.onnx_engine import INPUT, OUTPUTS, OnnxEngine
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.frames.quality_flags import quality_flags
from echoquad_runtime.frames.reader import read_checked
from echoquad_runtime.quadrants import frame_quadrants

AIM, ENGINE_AIM = 0.90, 0.97
STAGES = ("decode", "quadrants", "inference")
IN_A_ROW = 8  # frames in ready batches one after the other: after a pause, where threads wake up would decide
SLOTS = ((1, 1), (1, 8), (None, 1))  # threads (None: all) and frames: of a folder's worker, in batches, of a live frame


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--kind", choices=list(KINDS), default="rgb-png")
    parser.add_argument("--precision", help="such as fp32,int8 (default: those of the bundle, without fp16)")
    options = parser.parse_args()

    bundle = Bundle(options.bundle)
    precisions = (options.precision or ",".join(name for name in bundle.precisions if name != "fp16")).split(",")
    setting = Setting(Path(), options.bundle, options.threads)
    rows = [["", "ms a frame", "CPU ms a frame", "frames/s", "share", "aim"]]
    record: dict[str, Any] = {"frames": options.count, "rounds": options.rounds, "kind": options.kind}
    with tempfile.TemporaryDirectory() as work:
        files = make_frames(Path(work) / "frames", options.kind, options.count, options.frames)
        for precision in precisions:
            whole = pipeline(setting, precision, files, Path(work), options.rounds)
            slots = engine_alone(bundle, precision, options.threads, options.rounds)
            rows += table(precision, whole, slots)
            record[precision] = {"pipeline": whole, "engine": slots}
    note = (
        f"Medians of {options.rounds} alternating rounds over {options.count} frames of 800x600, {options.kind}, "
        f"{options.threads} threads. The share of a pass is its frames a second over the bound of the same round. "
        "CPU time tells what was computed where other work on the machine makes the clock's time longer."
    )
    report("efficiency", rows, record, options.results, threads=options.threads, notes=[note])


def pipeline(setting: Setting, precision: str, files: Sequence[Path], work: Path, rounds: int) -> dict[str, Any]:
    """Measure the stages alone, plain threads, and the product, in turn."""
    contract, threads, count = setting.contract, setting.threads, len(files)
    slots = SlotPool(OnnxEngine(setting.bundle, precision=precision, device="cpu", threads=1), 1)
    make_pass = echoquad(setting, precision=precision)
    batches = np.zeros((count, 1, 4, 1, contract.input_size, contract.input_size), np.uint8)
    greys = [read_checked(path)[0] for path in files]

    def decode(index: int) -> None:
        greys[index] = read_checked(files[index])[0]

    def cut(index: int) -> None:
        frame_quadrants(greys[index], contract, out=batches[index, 0])
        quality_flags(batches[index, 0])

    stages = dict(zip(STAGES, (decode, cut, lambda index: slots.run(batches[index], 1)), strict=True))

    def go_through(share: Sequence[int]) -> None:
        for index in share:
            for stage in stages.values():
                stage(index)

    times: dict[str, list[float]] = {name: [] for name in (*STAGES, "bound", "bare", "product")}
    cpus: dict[str, list[float]] = {name: [] for name in times}
    with ThreadPoolExecutor(threads) as pool:
        shares = [range(first, count, threads) for first in range(threads)]
        for turn in range(rounds + 1):  # the first is to warm all of it
            with one_core():
                alone = {name: clocked(lambda s=stage: [s(i) for i in range(count)]) for name, stage in stages.items()}
            bare = clocked(lambda: list(pool.map(go_through, shares)))
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
    """Give the median over the rounds of the least time over the time taken."""
    return statistics.median(least / one for least, one in zip(bound, taken, strict=True))


def clocked(call: Callable[[], object]) -> tuple[float, float]:
    """Give the seconds of a call on the clock, and the process's CPU-seconds."""
    time.sleep(PAUSE)
    begin, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin, time.process_time() - cpu


def engine_alone(bundle: Bundle, precision: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Time a slot against `session.run`, on sessions that are opened alike."""
    size, found = bundle.contract.input_size, []
    for wanted, frames in SLOTS:
        count = wanted or threads
        engine = OnnxEngine(bundle, precision=precision, device="cpu", threads=count)
        slots = SlotPool(engine, frames)
        session = open_session(bundle.read_model(precision), device="cpu", threads=count).session
        runs = IN_A_ROW // frames
        batch = np.random.default_rng(0).integers(0, 256, (4 * frames, 1, size, size), np.uint8)
        frames_of_it = batch.reshape(frames, 4, 1, size, size)
        calls = {
            "bare": lambda s=session, b=batch, runs=runs: [s.run(OUTPUTS, {INPUT: b}) for _ in range(runs)],
            "engine": lambda s=slots, b=frames_of_it, runs=runs: [s.run(b, len(b)) for _ in range(runs)],
        }
        medians = {name: ms / runs for name, ms in alternate(calls, rounds).items()}
        found.append({"threads": count, "frames": frames, **medians, "share": medians["bare"] / medians["engine"]})
    return found


def table(precision: str, whole: dict[str, Any], slots: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [
        [f"{precision}: {name}, one core", f"{ms:.2f}", f"{whole['cpu_ms'][name]:.2f}", f"{1e3 / ms:.1f}", "", ""]
        for name, ms in whole["stage_ms"].items()
    ]
    for name, key, fps, share, aim in (
        ("bound: cores / sum", "bound", whole["bound_fps"], 1.0, ""),
        ("bare threads", "bare", whole["bare_threads_fps"], whole["bare_threads_share"], ""),
        ("EchoQuad, files to CSV", "product", whole["fps"], whole["share"], f"{AIM:.2f}"),
    ):
        cpu = f"{whole['cpu_ms'][key]:.2f}"
        rows.append([f"{precision}: {name}", f"{1e3 / fps:.2f}", cpu, f"{fps:.1f}", f"{share:.3f}", aim])
    for slot in slots:
        ms = slot["engine"] / slot["frames"]
        name = f"{precision}: engine alone, {slot['threads']} thread(s), {slot['frames']} frame(s) a run"
        rows.append([name, f"{ms:.2f}", "", f"{1e3 / ms:.1f}", f"{slot['share']:.3f}", f"{ENGINE_AIM:.2f}"])
    return rows


if __name__ == "__main__":
    main()
