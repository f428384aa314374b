"""Time of the whole process `echoquad predict BUNDLE FRAME`, against a minimal script.

    python benchmarks/startup.py BUNDLE FRAME [--rounds 15] [--results benchmarks/RESULTS.md]

The bare script imports numpy, Pillow and onnxruntime, loads the same graph and runs it once on zeros: no frame, no hash
check, no vote. For comparison: the interpreter alone, the three imports alone, and the imports of torch alone. EchoQuad
starts without a cache, with an empty one, and with a filled one. All are interleaved; a ratio is the median over the
rounds of the time over that of the bare script in the same round. Bytecode is compiled beforehand, as pip does.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import util
from pathlib import Path

from common import arguments, paired_ratio, report, rotated

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import model_file

AIM = 1.7  # times the bare script
WARM_UP = 2  # rounds, for bytecode, disk cache and EchoQuad's cache

BARE = """
import sys
import numpy as np
from PIL import Image
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
size = int(sys.argv[2])
print(session.run(None, {"quadrants": np.zeros((4, 1, size, size), np.uint8)})[1].mean(axis=0))
"""
ECHOQUAD = "from echoquad.cli.framework.main import main; main()"  # content of the installed script


def main() -> None:
    parser = arguments(__doc__, frames=False, rounds=15)
    parser.add_argument("frame", type=Path, help="an image file")
    options = parser.parse_args()

    bundle = Bundle(options.bundle)
    threads = str(options.threads)
    lines: dict[str, list[str]] = {
        "interpreter": ["pass"],
        "imports of numpy, Pillow, onnxruntime": ["import numpy, PIL.Image, onnxruntime"],
    }
    if util.find_spec("torchvision") is not None:
        lines["imports of torch, torchvision, Pillow"] = ["import torch, torchvision, PIL.Image"]
    for precision in bundle.precisions:
        graph = str(options.bundle / model_file(precision))
        predict = [ECHOQUAD, "predict", str(options.bundle), str(options.frame), "--precision", precision]
        predict += ["--device", "cpu", "--threads", threads, "--untuned"]
        lines[f"{precision}: bare script"] = [BARE, graph, str(bundle.contract.input_size), threads]
        lines |= {f"{precision}: echoquad predict, {state}": predict for state in ("no cache", "empty cache", "cache")}

    with tempfile.TemporaryDirectory() as folder:
        times, cpus = measure(lines, options.rounds, Path(folder))

    rows = [["", "median ms", "fastest ms", "CPU ms", "of the bare script"]]
    ratios: dict[str, float] = {}
    for name, found in times.items():
        bare = times.get(f"{name.partition(':')[0]}: bare script")
        if bare is not None and bare is not found:
            ratios[name] = paired_ratio(found, bare)
        shown = f"{ratios[name]:.2f}" if name in ratios else ""
        middle, cpu = statistics.median(found), statistics.median(cpus[name])
        rows.append([name, f"{1e3 * middle:.0f}", f"{1e3 * min(found):.0f}", f"{1e3 * cpu:.0f}", shown])
    record = {
        "input_size": bundle.contract.input_size,
        "rounds": options.rounds,
        "aim": AIM,
        "median_ms": {name: 1e3 * statistics.median(found) for name, found in times.items()},
        "cpu_ms": {name: 1e3 * statistics.median(found) for name, found in cpus.items()},
        "ratio": ratios,
    }
    notes = [f"Aim: with a filled cache at most {AIM} times the bare script."]
    report("startup", rows, record, options.results, threads=options.threads, notes=notes)


def measure(
    lines: dict[str, list[str]], rounds: int, folder: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Run each line of Python in separate processes, interleaved; return wall and CPU seconds."""
    times: dict[str, list[float]] = {name: [] for name in lines}
    cpus: dict[str, list[float]] = {name: [] for name in lines}
    caches = {"no cache": "", "empty cache": str(folder / "empty"), "cache": str(folder / "filled")}
    for turn in range(WARM_UP + rounds):
        for name in rotated(list(lines), turn):
            environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
            environment["ECHOQUAD_CACHE_DIR"] = caches.get(name.rpartition(", ")[2], "")
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
            shutil.rmtree(folder / "empty", ignore_errors=True)
            command = [sys.executable, "-c", *lines[name]]
            before, begin = os.times(), time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            seconds, after = time.perf_counter() - begin, os.times()
            if done.returncode:
                raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr}")
            if turn >= WARM_UP:
                times[name].append(seconds)
                cpu = after.children_user - before.children_user + after.children_system - before.children_system
                cpus[name].append(cpu)
    return times, cpus


if __name__ == "__main__":
    main()
