"""What the benchmarks share: arguments, frames, alternating rounds, and the report with the machine it was taken on."""

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

WARM_UP = 3  # rounds: they allocate and choose kernels
PAUSE = 0.08  # seconds: threads of the engine before, which spin on for half of that, would take a core from the next
PACKAGES = ("echoquad", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "torchvision", "numpy", "pillow")
FRAME_SIZE = (800, 600)  # width and height
KINDS: dict[str, tuple[str, str, dict[str, int]]] = {  # Pillow's mode, ending, options of its encoder
    "rgb-png": ("RGB", ".png", {}),
    "l-png": ("L", ".png", {}),
    "rgb-jpeg": ("RGB", ".jpg", {"quality": 90}),
    "grey-jpeg": ("L", ".jpg", {"quality": 90}),
}
QUANTILES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}

Item = TypeVar("Item")

_HEAD = """# Results

Written by the scripts of this folder when they are given `--results`; each section says by which command, on which
machine and in which versions. Compare ratios, not times: other work on the machine slows all rows of a table alike.
"""


# ---------------------------------------------------------------------------------------------- arguments


def arguments(doc: str | None, *, run: bool = False, frames: bool = True, rounds: int = 0) -> argparse.ArgumentParser:
    """Give a parser with what every script takes; RUN, ``--frames`` and ``--rounds`` where they are asked for."""
    first, _, rest = (doc or "").partition("\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    if run:
        parser.add_argument("run", type=Path, help="folder that `echoquad train` wrote")
    parser.add_argument("bundle", type=Path, help="folder that `echoquad export` wrote")
    if frames:
        parser.add_argument("--frames", type=Path, help="folder of frames; phantoms are drawn where not given")
        parser.add_argument("--count", type=int, default=64, help="frames to take (default %(default)s)")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="default: all CPUs, %(default)s")
    parser.add_argument("--results", type=Path, help="file whose section of this script is to be rewritten")
    return parser


# ---------------------------------------------------------------------------------------------- frames


def make_frames(
    folder: Path, kind: str, count: int, source: Path | None = None, size: tuple[int, int] = FRAME_SIZE
) -> list[Path]:
    """Write `count` frames of a kind in `KINDS` into `folder`, each `size` (width, height); the same every time.

    They are those of the folder `source`, in an order drawn by lot and again from the start where there are too few;
    phantoms where there is none.
    """
    mode, ending, options = KINDS[kind]
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


def plant_tree(folder: Path, frames: Sequence[Path], count: int, a_folder: int = 500) -> None:
    """Make `count` hard links to frames, in turn, in subfolders: a large tree that takes no room."""
    for index in range(count):
        frame, where = frames[index % len(frames)], folder / f"{index // a_folder:04}"
        if index % a_folder == 0:
            where.mkdir(parents=True)
        os.link(frame, where / f"{index:06}{frame.suffix}")


# ---------------------------------------------------------------------------------------------- timing


def alternate(calls: Mapping[str, Callable[[], object]], rounds: int, pause: float = PAUSE) -> dict[str, float]:
    """Call each in turn, as `time_in_turn` does; return median milliseconds by name."""
    return {name: statistics.median(times) for name, times in time_in_turn(calls, rounds, pause).items()}


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], rounds: int, pause: float = PAUSE
) -> dict[str, list[float]]:
    """Call each in turn, `rounds` times, beginning with another one each round; return milliseconds by name.

    A machine that slows down in the middle slows all of them down, so their ratios hold. Each turn is a pause of so
    many seconds, a call that wakes the processor, and the call that is timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + WARM_UP):
        for name in rotated(list(calls), turn):
            time.sleep(pause)
            calls[name]()
            begin = time.perf_counter()
            calls[name]()
            if turn >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """Give the items in the order of a round: each round begins with the next one."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Give the median over the rounds of one's time over the other's in the same round: a slow round hurts neither."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Give p50, p95, p99 and the largest."""
    return {name: float(np.percentile(values, q)) for name, q in QUANTILES.items()}


@contextmanager
def one_core() -> Iterator[None]:
    """Tie this thread to one CPU, where the system has a call for it."""
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
    """A process that has ended: wall seconds, CPU seconds, peak memory in megabytes (10^6 bytes), and what it said."""

    seconds: float
    cpu: float
    peak_mb: float
    out: str
    err: str


# It stands between, so that what the process took is known to the system apart from what this one takes: on Linux a
# program is born with its parent's peak.
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
    """Run ``python LINE`` and measure it; needs Linux or macOS.

    `expected` is the exit code that it has to end with; None is any.
    """
    command = [sys.executable, "-S", "-E", "-c", _LAUNCHER, sys.executable, *map(str, line)]
    code, *found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ran = Ran(*found)
    if expected not in (None, code):
        raise SystemExit(f"{shlex.join(map(str, line))} ended with {code}, expected {expected}: {ran.err}")
    return ran


# ---------------------------------------------------------------------------------------------- report


def machine(threads: int) -> str:
    """Name the processor, the system and the threads that were used."""
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
    """Give the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows, the first of them the header, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows, the first of them the header, as a table of Markdown."""
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
    """Print a table, lines that belong to it, and the whole of the findings as one JSON line.

    Parameters
    ----------
    name
        The script's, and its section's.
    rows
        The table's cells as text; the first row is the header.
    record
        JSON values; command, date, machine and versions are added.
    results
        ``RESULTS.md``, where the section of this name is put in place of the older one; None writes nothing.
    threads
        That were used; None is all CPUs.
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
    """Return what a record says of its run: benchmark, command, date, machine and versions."""
    return {
        "benchmark": name,
        "command": shown_command(sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(threads or available_cpus()),
        "versions": versions(*PACKAGES),
    }


def write_section(results: Path, name: str, parts: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Write a section of ``RESULTS.md``: its name, the command, `parts`, and the machine of `run_facts`."""
    last = f"{facts['date']}; {facts['machine']}; {_listed(facts['versions'])}."
    text = "\n\n".join([f"## {name}", f"`{facts['command']}`", *parts, last])
    old = results.read_text("utf-8") if results.exists() else _HEAD
    with write_atomically(results) as stream:
        stream.write(replace_section(old, name, text).encode())


def replace_section(document: str, name: str, text: str) -> str:
    """Put `text` between the markers of a section, which go to the end where they are not there yet."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text}\n{end}"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if found.search(document):
        return found.sub(lambda _: section, document, count=1)
    return f"{document.rstrip()}\n\n{section}\n"


def shown_command(argv: Sequence[str]) -> str:
    """Give the command line without the folders of the machine that it was run on."""
    script = f"benchmarks/{Path(argv[0]).name}"
    return shlex.join(["python", script, *(Path(word).name if Path(word).is_absolute() else word for word in argv[1:])])


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
