"""Peak memory of `echoquad predict` on a small and a large tree and with `--resume`, and its parts; Linux, macOS.

    python benchmarks/memory.py BUNDLE [--frames FOLDER] [--counts 1000,20000] [--results benchmarks/RESULTS.md]

The trees consist of hard links to a few frames, in subfolders. `--resume` continues a run on the largest tree that was
killed half-way. Small frames and a small network keep it fast: the question is which memory grows with the number of
frames.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import FORMATS, Ran, arguments, link_tree, make_frames, report, run_process

from echoquad_runtime.bundle.bundle import Bundle

AIM = 1.05  # peak of the largest tree over that of the smallest

# Prints the resident memory after each step.
_STEPS = """
import json, os, sys
def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
found = [("interpreter", resident())]
import numpy, PIL.Image
found.append(("numpy, Pillow", resident()))
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
load_onnxruntime()
found.append(("onnxruntime", resident()))
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.predict.predictor import Predictor
found.append(("EchoQuad's modules", resident()))
bundle = Bundle(sys.argv[1])
found.append(("bundle, read and hashed", resident()))
threads = int(sys.argv[4])
predictor = Predictor(bundle, precision=sys.argv[2], device="cpu", threads=threads, concurrent=True)
found.append(("session", resident()))
for _ in range(3):
    list(predictor.predict([sys.argv[3]]))
found.append(("workers, slots, frames in flight", resident()))
print(json.dumps(found))
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--counts", default="1000,20000", help="frames per tree (default %(default)s)")
    parser.add_argument("--format", choices=list(FORMATS), default="l-png")
    parser.add_argument("--size", default="200x150", help="width and height of a frame (default %(default)s)")
    parser.add_argument("--precision", help="default: that of the bundle")
    options = parser.parse_args()

    precision = options.precision or Bundle(options.bundle).default_precision
    counts = sorted(map(int, options.counts.split(",")))
    line = ["predict", options.bundle, "--precision", precision, "--device", "cpu", "--untuned"]
    line += ["--threads", str(options.threads)]
    rows = [["", "frames", "peak MB", "seconds", "of the smallest tree"]]
    found: dict[str, Any] = {"trees": [], "precision": precision}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        width, height = map(int, options.size.split("x"))
        frames = make_frames(work / "frames", options.format, options.count, options.frames, (width, height))
        for count in counts:
            tree, out = work / f"tree-{count}", work / f"{count}.csv"
            link_tree(tree, frames, count)
            ran = run_process("-m", "echoquad", *line, tree, "--out", out)
            check_rows(out, count)
            found["trees"].append({"frames": count, "peak_mb": ran.peak_mb, "seconds": ran.seconds})
        found["resume"] = resume(line, tree, out, counts[-1])
        found["components_mb"] = components(options.bundle, precision, work / "frames", options.threads)

    least = found["trees"][0]["peak_mb"]
    rows += [cells("a tree", one, least) for one in found["trees"]]
    rows.append(cells("the largest tree, resumed half-way", found["resume"], least))
    found["ratio"] = found["trees"][-1]["peak_mb"] / least
    before = 0.0
    for name, resident in found["components_mb"]:
        rows.append([f"resident with: {name}", "", f"{resident:.1f}", "", f"+{resident - before:.1f} MB"])
        before = resident
    notes = [f"The largest tree needs {found['ratio']:.3f} times the memory of the smallest (aim: at most {AIM})."]
    report("memory", rows, found, options.results, threads=options.threads, notes=notes)


def cells(name: str, one: dict[str, Any], least: float) -> list[str]:
    return [
        name,
        str(one["frames"]),
        f"{one['peak_mb']:.1f}",
        f"{one['seconds']:.1f}",
        f"{one['peak_mb'] / least:.3f}",
    ]


def resume(line: Sequence[str | Path], tree: Path, expected: Path, count: int) -> dict[str, Any]:
    """Kill a run after half of its rows, resume it, and return the resources of the second run."""
    folder = expected.with_name("resumed")
    folder.mkdir()
    out = folder / "rows.csv"
    half, command = expected.stat().st_size / 2, [*line, tree, "--out", out]
    process = subprocess.Popen([sys.executable, "-m", "echoquad", *map(str, command)], stderr=subprocess.DEVNULL)
    while process.poll() is None and written(folder) < half:
        time.sleep(0.02)
    process.kill()
    process.wait()
    left = written(folder)
    ran: Ran = run_process("-m", "echoquad", *command, "--resume")
    check_rows(out, count)
    if out.read_bytes() != expected.read_bytes():
        raise SystemExit("the resumed rows differ from those of an uninterrupted run")
    return {"frames": count, "peak_mb": ran.peak_mb, "seconds": ran.seconds, "bytes_left_by_the_killed": left}


def written(folder: Path) -> int:
    """Return the size of the largest file in a folder, in bytes."""
    return max((entry.stat().st_size for entry in os.scandir(folder)), default=0)


def check_rows(out: Path, count: int) -> None:
    with out.open("rb") as stream:
        rows = sum(1 for _ in stream) - 1
    if rows != count:
        raise SystemExit(f"{out.name} holds {rows} rows; expected {count}")


def components(bundle: Path, precision: str, frames: Path, threads: int) -> list[tuple[str, float]]:
    """Return the resident memory after each step in megabytes, on Linux; [] elsewhere."""
    if sys.platform != "linux":
        return []
    ran = run_process("-c", _STEPS, bundle, precision, frames, str(threads))
    return [(name, resident) for name, resident in json.loads(ran.out)]


if __name__ == "__main__":
    main()
