"""Frames per second from files to a CSV: EchoQuad, the reference pipeline, and plain implementations (peers).

    python benchmarks/peers.py RUN BUNDLE [--frames FOLDER] [--formats rgb-png,rgb-jpeg] [--results FILE]

Each peer is a process that prepares once and then makes passes over the same files. A round has one pass of each peer,
with pauses, and starts with the next peer each time. First, all peers must agree in their decisions.
BUNDLE was exported from RUN. EchoQuad is measured without and with the start of the process. See `workers/peer.py`.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from common import FORMATS, PAUSE, arguments, make_frames, paired_ratio, report, rotated
from workers.peer import PIPELINES

from echoquad_runtime.bundle.bundle import Bundle

REFERENCE = "reference"
AIMS = {"fp32": 2.2, "int8": 6.0}  # times the reference pipeline, on RGB PNG
# Allowed difference of a probability from the reference: rounding for float32, the export gate for the others.
CLOSE = {"fp32": 1e-3, "int8": 0.05, "bf16": 0.05}


class Peer:
    """A process of `workers.peer`; `unavailable_reason` is empty if it can run here."""

    def __init__(self, name: str, run: Path, bundle: Path, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "workers.peer", name, run, bundle, threads]
        path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": str(threads)},
        )
        self.unavailable_reason: str = self._answer()

    def make_pass(self, folder: Path, out: Path) -> tuple[float, float]:
        """Process the frames of a folder to a CSV; return wall and CPU seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(folder), str(out)]) + "\n")
        self._process.stdin.flush()
        wall, cpu = self._answer()
        return wall, cpu

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}; see its error above")
        return json.loads(line)


@dataclass
class Times:
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def main() -> None:
    parser = arguments(__doc__, run=True, rounds=5)
    parser.add_argument(
        "--formats", default="rgb-png", help=f"comma-separated, of {', '.join(FORMATS)} (default %(default)s)"
    )
    parser.add_argument("--peers", help=f"comma-separated, of {', '.join(PIPELINES)} (default: all that can run here)")
    options = parser.parse_args()

    names, left_out = choose(options.peers, Bundle(options.bundle).precisions)
    notes: list[str] = []
    peers: list[Peer] = []
    rows: list[list[str]] = []
    record: dict[str, Any] = {"frames": options.count, "rounds": options.rounds, "kinds": {}, "left_out": left_out}
    try:
        for name in names:
            peer = Peer(name, options.run, options.bundle, options.threads)
            if peer.unavailable_reason:
                peer.close()
                left_out.append(f"{PIPELINES[name].title} ({peer.unavailable_reason})")
                continue
            peers.append(peer)
            print(f"prepared: {PIPELINES[name].title}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as work:
            for file_format in options.formats.split(","):
                frames = Path(work) / file_format
                make_frames(frames, file_format, options.count, options.frames)
                agreement = agree(peers, frames, Path(work) / "check")
                times = measure(peers, frames, Path(work) / "passes", options.rounds)
                found = figures(times, options.count, agreement)
                record["kinds"][file_format] = found
                rows += table(file_format, found) if not rows else table(file_format, found)[1:]
                notes += verdict(file_format, found)
    finally:
        for peer in peers:
            peer.close()
    notes += [f"Left out: {line}." for line in left_out]
    notes.append(
        f"Median of {options.rounds} interleaved passes over {options.count} frames of 800x600; ratios are "
        "medians over the rounds. All decisions agree; dp is the largest difference of a probability."
    )
    report("peers", rows, record, options.results, threads=options.threads, notes=notes)


def choose(asked: str | None, precisions: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the peers that can run, the reference first, and why the others cannot."""
    names = list(PIPELINES) if asked is None else list(dict.fromkeys([REFERENCE, *asked.split(",")]))
    if unknown := [name for name in names if name not in PIPELINES]:
        raise SystemExit(f"no peer {', '.join(unknown)}; expected some of {', '.join(PIPELINES)}")
    chosen, left_out = [], []
    for name in names:
        pipeline = PIPELINES[name]
        if pipeline.needs and find_spec(pipeline.needs) is None:
            left_out.append(f"{pipeline.title} ({pipeline.needs} is not installed)")
        elif {"bf16": "fp32"}.get(pipeline.precision, pipeline.precision) not in precisions:
            left_out.append(f"{pipeline.title} (the bundle holds no {pipeline.precision})")
        else:
            chosen.append(name)
    return chosen, left_out


def agree(peers: list[Peer], frames: Path, folder: Path) -> dict[str, float]:
    """Make an untimed pass of each peer and compare the rows; return the largest |dp| of each."""
    folder.mkdir(exist_ok=True)
    expected: dict[str, list[str]] = {}
    largest: dict[str, float] = {}
    for peer in peers:
        out = folder / f"{peer.name}.csv"
        out.unlink(missing_ok=True)
        peer.make_pass(frames, out)
        found = read_rows(out)
        expected = expected or found
        largest[peer.name] = compare(peer.name, found, expected)
    return largest


def read_rows(path: Path) -> dict[str, list[str]]:
    """Return the rows of a CSV by file name, from the decision to the last probability."""
    with path.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    end = max(index for index, name in enumerate(header) if name.startswith("p_")) + 1
    return {row[0]: row[2:end] for row in rows}


def compare(name: str, found: dict[str, list[str]], expected: dict[str, list[str]]) -> float:
    """Return the largest difference of a probability; decisions may differ only within the allowed difference."""
    bound = CLOSE[PIPELINES[name].precision]
    if found.keys() != expected.keys():
        raise SystemExit(f"{name} has {len(found)} rows, the reference {len(expected)}; expected the same files")
    largest = 0.0
    for file, row in found.items():
        for mine, its in zip(row, expected[file], strict=True):
            if _is_number(mine):
                largest = max(largest, abs(float(mine) - float(its)))
        changed = [i for i, (mine, its) in enumerate(zip(row, expected[file], strict=True)) if mine != its]
        for index in (
            i for i in changed if i and not _is_number(row[i])
        ):  # a label, then the probabilities of its classes
            numbers = sorted((float(value) for value in _numbers_after(row, index)), reverse=True)
            if numbers[0] - numbers[1] > 2 * bound:
                raise SystemExit(f"{name} decides {row[index]} for {file}; expected {expected[file][index]}")
    if largest > bound:
        raise SystemExit(f"{name} differs by {largest:.4f} on a probability; expected at most {bound}")
    return largest


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _numbers_after(row: list[str], index: int) -> list[str]:
    end = next((i for i in range(index + 1, len(row)) if not _is_number(row[i])), len(row))
    return row[index + 1 : end]


def measure(peers: list[Peer], frames: Path, folder: Path, rounds: int) -> dict[str, Times]:
    """Time one pass of each peer per round."""
    folder.mkdir(exist_ok=True)
    by_name = {peer.name: peer for peer in peers}
    times = {name: Times() for name in by_name}
    number = count(len(list(folder.iterdir())))
    for turn in range(rounds):
        for name in rotated(list(by_name), turn):
            time.sleep(3 * PAUSE)
            wall, cpu = by_name[name].make_pass(frames, folder / f"{next(number):05}.csv")
            times[name].wall.append(wall)
            times[name].cpu.append(cpu)
    return times


def figures(times: dict[str, Times], frames: int, agreement: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return the figures of the peers by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, taken in times.items():
        precision = PIPELINES[name].precision
        others = [n for n in times if PIPELINES[n].precision == precision and not n.startswith("echoquad")]
        best = min(others, key=lambda other: statistics.median(times[other].wall), default=None)
        found[name] = {
            "title": PIPELINES[name].title,
            "precision": precision,
            "frames_per_second": frames / statistics.median(taken.wall),
            "of_reference": paired_ratio(times[REFERENCE].wall, taken.wall),
            "best_peer": best,
            "of_best_peer": paired_ratio(times[best].wall, taken.wall) if best else None,
            "cpu_ms_per_frame": 1e3 * statistics.median(taken.cpu) / frames,
            "max_abs_dp": agreement[name],
            "seconds": taken.wall,
        }
    return found


def table(file_format: str, found: dict[str, dict[str, Any]]) -> list[list[str]]:
    header = [
        "peer",
        "files",
        "frames/s",
        "of the reference pipeline",
        "of the best peer of its precision",
        "CPU ms",
        "dp",
    ]
    return [header] + [
        [
            one["title"],
            file_format,
            f"{one['frames_per_second']:.1f}",
            f"{one['of_reference']:.2f}",
            "" if one["of_best_peer"] is None else f"{one['of_best_peer']:.2f}",
            "" if name.endswith("-process") else f"{one['cpu_ms_per_frame']:.1f}",
            f"{one['max_abs_dp']:.4f}",
        ]
        for name, one in found.items()
    ]


def verdict(file_format: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """Compare EchoQuad with its aims, one sentence per precision."""
    lines = []
    for precision, aim in AIMS.items():
        if (one := found.get(f"echoquad-{precision}")) is None:
            continue
        words = f"{file_format}, EchoQuad {precision}: {one['of_reference']:.2f} times the reference pipeline"
        if file_format == "rgb-png":
            words += f" (aim {aim:g})"
        if one["of_best_peer"] is not None:
            words += f", {one['of_best_peer']:.2f} of the best peer of its precision, {one['best_peer']} (aim 1)"
        lines.append(f"{words}.")
    return lines


if __name__ == "__main__":
    main()
