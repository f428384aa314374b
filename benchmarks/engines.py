"""What one frame's four quadrants cost in each engine, alternating in one run, on the same weights.

    python benchmarks/engines.py RUN BUNDLE [--frames 60] [--threads 2]

Prints a table, then one JSON line. Decoding is left out; `echoquad bench` has it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from echoquad_runtime.bundle import Bundle
from echoquad_runtime.session import OnnxEngine
from echoquad_train.checkpoint import load_run
from echoquad_train.engine import TorchEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    run = load_run(options.run)
    eager = TorchEngine(run.model, run.contract)
    bundled = OnnxEngine(Bundle(options.bundle), device="cpu", threads=options.threads)
    size = run.contract.input_size
    quadrants = np.random.default_rng(0).integers(0, 256, (4, 1, size, size), np.uint8)

    def one_by_one() -> None:
        for quadrant in quadrants:
            eager.infer(quadrant[None])

    engines: dict[str, Callable[[], object]] = {
        "torch eager, quadrant by quadrant": one_by_one,
        "torch eager, batch of 4": lambda: eager.infer(quadrants),
        f"EchoQuad, {bundled.precision}": lambda: bundled.infer(quadrants),
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(options.frames + 5):
        for name, call in engines.items():
            begin = time.perf_counter()
            call()
            if turn >= 5:  # the first turns allocate and choose kernels
                times[name].append(1e3 * (time.perf_counter() - begin))

    medians = {name: statistics.median(values) for name, values in times.items()}
    last = medians[f"EchoQuad, {bundled.precision}"]
    print(f"{'engine':36} {'ms a frame':>10} {'of EchoQuad':>12}")
    for name, median in medians.items():
        print(f"{name:36} {median:10.2f} {median / last:12.2f}")
    versions = {name: metadata.version(name) for name in ("torch", "onnxruntime", "numpy")}
    machine = f"{platform.system()} {platform.machine()}, {options.threads} threads"
    print(json.dumps({"input_size": size, "median_ms": medians, "machine": machine, "versions": versions}))


if __name__ == "__main__":
    main()
