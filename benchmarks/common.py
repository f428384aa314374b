"""Helpers of the benchmarks: command line, test frames, interleaved timing, processes, and the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from echoquad_runtime.devices.cpu_info import available_cpus
from echoquad_runtime.frames.discovery import walk
from echoquad_runtime.storage.atomic import write_atomically

WARM_UP = 3  # rounds, in which engines allocate memory and choose kernels
PAUSE = 0.08  # seconds; threads of the previous engine spin for about half of that and would occupy a core
PACKAGES = ("echoquad", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "torchvision", "numpy", "pillow")
FRAME_SIZE = (800, 600)  # width and height
FORMATS: dict[str, tuple[str, str, dict[str, int]]] = {  # Pillow's mode, file extension, encoder options
    "rgb-png": ("RGB", ".png", {}),
    "l-png": ("L", ".png", {}),
    "rgb-jpeg": ("RGB", ".jpg", {"quality": 90}),
    "grey-jpeg": ("L", ".jpg", {"quality": 90}),
}
QUANTILES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}

Item = TypeVar("Item")

_HEAD = """# Results

Written by the scripts of this folder with `--results`. Each section names its command, machine and versions. Compare
ratios, not times: other work on the machine slows all rows of a table alike.
"""


# Command line


def arguments(doc: str | None, *, run: bool = False, frames: bool = True, rounds: int = 0) -> argparse.ArgumentParser:
    """Return a parser with the common arguments; RUN, ``--frames`` and ``--rounds`` are optional."""
    first, _, rest = (doc or "").partition("\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    if run:
        parser.add_argument("run", type=Path, help="folder that `echoquad train` wrote")
    parser.add_argument("bundle", type=Path, help="folder that `echoquad export` wrote")
    if frames:
        parser.add_argument("--frames", type=Path, help="folder of frames (default: phantoms)")
        parser.add_argument("--count", type=int, default=64, help="number of frames (default %(default)s)")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds (default %(default)s)")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads (default: all, %(default)s)")
    parser.add_argument("--results", type=Path, help="Markdown file whose section of this script is replaced")
    return parser


# Frames


def make_frames(
    folder: Path, file_format: str, count: int, source: Path | None = None, size: tuple[int, int] = FRAME_SIZE
) -> list[Path]:
    """Write `count` frames of a format in `FORMATS` into `folder`, each of `size` (width, height); deterministic.

    The frames are those of the folder `source` in random order, repeated if there are too few, or phantoms.
    """
    mode, ending, options = FORMATS[file_format]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, image in enumerate(_grey_images(source, count, size)):
        paths.append(folder / f"frame-{index:05}{ending}")
        image.convert(mode).save(paths[-1], **options)
    return paths


def _grey_images(source: Path | None, count: int, size: tuple[int, int]) -> Iterator[Image.Image]:
    if source is None:
        from echoquad_train.phantom.drawing import LABELS, phantom_frame

        for seed in range(count):
            yield Image.fromarray(phantom_frame(seed, LABELS[seed % 2], (size[1], size[0])))
        return
    found = list(walk(source))
    if not found:
        raise SystemExit(f"{source}: no frame found; expected a folder with PNG or JPEG files")
    random.Random(0).shuffle(found)
    for index in range(count):
        with Image.open(found[index % len(found)]) as image:
            yield image.convert("L").resize(size, Image.Resampling.BICUBIC)


def link_tree(folder: Path, frames: Sequence[Path], count: int, per_folder: int = 500) -> None:
    """Create `count` hard links to frames in subfolders: a large tree that takes no disk space."""
    for index in range(count):
        frame, parent = frames[index % len(frames)], folder / f"{index // per_folder:04}"
        if index % per_folder == 0:
            parent.mkdir(parents=True)
        os.link(frame, parent / f"{index:06}{frame.suffix}")


# Timing


def alternate(calls: Mapping[str, Callable[[], object]], rounds: int, pause: float = PAUSE) -> dict[str, float]:
    """Time calls with `time_interleaved`; return median milliseconds by name."""
    return {name: statistics.median(times) for name, times in time_interleaved(calls, rounds, pause).items()}


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, pause: float = PAUSE, untimed: int = 1
) -> dict[str, list[float]]:
    """Time calls in `rounds` rounds, each starting with the next call; return milliseconds by name.

    A slowdown of the machine affects all calls alike, so ratios stay valid. Each turn is a pause in seconds, `untimed`
    calls that wake the processor, and the timed call. Sleeping threads of an engine may need 4 ms to wake.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + WARM_UP):
        for name in rotated(list(calls), turn):
            time.sleep(pause)
            for _ in range(untimed):
                calls[name]()
            begin = time.perf_counter()
            calls[name]()
            if turn >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """Return the items in the order of a round: each round starts with the next item."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the ratios within rounds, which a slow round does not change."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95, p99 and the maximum."""
    return {name: float(np.percentile(values, q)) for name, q in QUANTILES.items()}


@contextmanager
def one_core() -> Iterator[None]:
    """Pin this thread to one CPU, on Linux."""
    if sys.platform != "linux":
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@dataclass(frozen=True)
class Ran:
    """A finished process: wall seconds, CPU seconds, peak memory in megabytes (10^6 bytes), stdout and stderr."""

    seconds: float
    cpu: float
    peak_mb: float
    out: str
    err: str


# An intermediate process, because on Linux a process inherits the peak memory of its parent.
_LAUNCHER = """
import json, resource, subprocess, sys, time
begin = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True, check=False)
seconds = time.perf_counter() - begin
used = resource.getrusage(resource.RUSAGE_CHILDREN)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
print(json.dumps([done.returncode, seconds, used.ru_utime + used.ru_stime, peak, done.stdout, done.stderr]))
"""


def run_process(*line: str | Path, expected: int | None = 0) -> Ran:
    """Run ``python LINE`` and measure it, on Linux or macOS. `expected` is the required exit code; None is any."""
    command = [sys.executable, "-S", "-E", "-c", _LAUNCHER, sys.executable, *map(str, line)]
    code, *found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ran = Ran(*found)
    if expected not in (None, code):
        raise SystemExit(f"{shlex.join(map(str, line))} ended with {code}, expected {expected}: {ran.err}")
    return ran


# Report


def machine(threads: int) -> str:
    """Return a description of the processor, the system and the threads in use."""
    processor = platform.processor() or platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    flags = next((line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("flags")), "").split()
    known = ", ".join(name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in flags)
    cpus = f"{available_cpus()} CPUs to use"
    return f"{processor} ({known or platform.machine()}), {cpus}, {platform.system()}, {threads} threads"


def versions(*names: str) -> dict[str, str]:
    """Return the versions of Python and of the installed packages."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a text table with a header; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a Markdown table; the first row is the header."""
    header, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([header, "|---|" + "---:|" * (len(rows[0]) - 1), *body])


def report(
    name: str,
    rows: Sequence[Sequence[str]],
    record: Mapping[str, Any],
    results: Path | None = None,
    *,
    threads: int | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Print a table, notes, and all results as one line of JSON.

    Parameters
    ----------
    name
        Name of the script and of its section.
    rows
        Cells of the table; the first row is the header.
    record
        JSON values; command, date, machine and versions are added.
    results
        Markdown file, such as ``RESULTS.md``, whose section of this name is replaced; None writes nothing.
    threads
        Threads in use; None is all CPUs.
    notes
        Sentences below the table.
    """
    facts = run_facts(name, threads)
    if results is not None:
        write_section(results, name, [as_markdown(rows), *notes], facts)
    print(as_text(rows))
    for note in notes:
        print(note)
    print(json.dumps(facts | dict(record), allow_nan=False), flush=True)


def run_facts(name: str, threads: int | None = None) -> dict[str, Any]:
    """Return benchmark, command, date, machine and versions for a record."""
    return {
        "benchmark": name,
        "command": shown_command(sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(threads or available_cpus()),
        "versions": versions(*PACKAGES),
    }


def write_section(results: Path, name: str, parts: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Replace a section of the results file: its name, the command, `parts`, and the machine of `run_facts`."""
    last = f"{facts['date']}; {facts['machine']}; {_listed(facts['versions'])}."
    text = "\n\n".join([f"## {name}", f"`{facts['command']}`", *parts, last])
    old = results.read_text("utf-8") if results.exists() else _HEAD
    with write_atomically(results) as stream:
        stream.write(replace_section(old, name, text).encode())


def replace_section(document: str, name: str, text: str) -> str:
    """Replace the text between the markers of a section; a new section goes to the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text}\n{end}"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if found.search(document):
        return found.sub(lambda _: section, document, count=1)
    return f"{document.rstrip()}\n\n{section}\n"


def shown_command(argv: Sequence[str]) -> str:
    """Return the command line without the folders of this machine."""
    script = f"benchmarks/{Path(argv[0]).name}"
    return shlex.join(["python", script, *(Path(word).name if Path(word).is_absolute() else word for word in argv[1:])])


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
