"""From files to a CSV: frames a second of EchoQuad, of the document's way, and of its peers written by hand.

    python benchmarks/peers.py RUN BUNDLE [--frames FOLDER] [--kinds rgb-png,rgb-jpeg] [--results benchmarks/RESULTS.md]

Each peer is a process of its own that prepares once and then makes a pass over the same files whenever it is its turn;
in a round each has one, with a pause between, beginning with another one each round. All must first agree in what they
decide. RUN is what BUNDLE was exported from. EchoQuad's rows are of the product's own predictor and writer, without and
with the start of the process.
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

from common import KINDS, PAUSE, arguments, make_frames, paired_ratio, report, rotated
from workers.peer import WAYS

from echoquad_runtime.bundle.bundle import Bundle

DOCUMENT = "document"
AIMS = {"fp32": 2.2, "int8": 6.0}  # times the document's way, on RGB PNG
# On a probability, against the document's way: float32 is rounding, the others are held as an export holds them.
CLOSE = {"fp32": 1e-3, "int8": 0.05, "bf16": 0.05}


class Peer:
    """A process that makes passes; see `peer_ways.serve`. `obstacle` is why it cannot, empty where it can."""

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
        self.obstacle: str = self._answer()

    def make_pass(self, folder: Path, out: Path) -> tuple[float, float]:
        """Take a folder's frames into a CSV; gives wall and CPU seconds."""
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
            raise SystemExit(f"{self.name} has ended with {self._process.wait()}; its error is above")
        return json.loads(line)


@dataclass
class Times:
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def main() -> None:
    parser = arguments(__doc__, run=True, rounds=5)
    parser.add_argument("--kinds", default="rgb-png", help=f"of {', '.join(KINDS)} (default %(default)s)")
    parser.add_argument("--peers", help=f"of {', '.join(WAYS)} (default: all that can run here)")
    options = parser.parse_args()

    names, left_out = choose(options.peers, Bundle(options.bundle).precisions)
    notes: list[str] = []
    peers: list[Peer] = []
    rows: list[list[str]] = []
    record: dict[str, Any] = {"frames": options.count, "rounds": options.rounds, "kinds": {}, "left_out": left_out}
    try:
        for name in names:
            peer = Peer(name, options.run, options.bundle, options.threads)
            if peer.obstacle:
                peer.close()
                left_out.append(f"{WAYS[name].title} ({peer.obstacle})")
                continue
            peers.append(peer)
            print(f"prepared: {WAYS[name].title}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as work:
            for kind in options.kinds.split(","):
                frames = Path(work) / kind
                make_frames(frames, kind, options.count, options.frames)
                agreement = agree(peers, frames, Path(work) / "check")
                times = race(peers, frames, Path(work) / "passes", options.rounds)
                found = figures(times, options.count, agreement)
                record["kinds"][kind] = found
                rows += table(kind, found) if not rows else table(kind, found)[1:]
                notes += verdict(kind, found)
    finally:
        for peer in peers:
            peer.close()
    notes += [f"Left out: {line}." for line in left_out]
    notes.append(
        f"Median of {options.rounds} alternating passes over {options.count} frames of 800x600; ratios are medians "
        "over the rounds. All decide alike: |dp| is the largest difference from the document's way."
    )
    report("peers", rows, record, options.results, threads=options.threads, notes=notes)


def choose(asked: str | None, precisions: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Name the peers that can run, the document's way first, and say why others cannot."""
    names = list(WAYS) if asked is None else list(dict.fromkeys([DOCUMENT, *asked.split(",")]))
    if unknown := [name for name in names if name not in WAYS]:
        raise SystemExit(f"no peer {', '.join(unknown)}; expected some of {', '.join(WAYS)}")
    chosen, left_out = [], []
    for name in names:
        way = WAYS[name]
        if way.needs and find_spec(way.needs) is None:
            left_out.append(f"{way.title} ({way.needs} is not installed)")
        elif {"bf16": "fp32"}.get(way.precision, way.precision) not in precisions:
            left_out.append(f"{way.title} (the bundle holds no {way.precision})")
        else:
            chosen.append(name)
    return chosen, left_out


def agree(peers: list[Peer], frames: Path, folder: Path) -> dict[str, float]:
    """Make the first pass of each, untimed, and compare what they wrote; gives each one's largest |dp|."""
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
    """Read a CSV's rows by file name, from the decision to the last probability."""
    with path.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    end = max(index for index, name in enumerate(header) if name.startswith("p_")) + 1
    return {row[0]: row[2:end] for row in rows}


def compare(name: str, found: dict[str, list[str]], expected: dict[str, list[str]]) -> float:
    """Give the largest difference of a probability; another decision is none only where it hangs on that much."""
    bound = CLOSE[WAYS[name].precision]
    if found.keys() != expected.keys():
        raise SystemExit(f"{name} judged {len(found)} frames, the document's way {len(expected)}, or others")
    largest = 0.0
    for file, row in found.items():
        for mine, its in zip(row, expected[file], strict=True):
            if _is_number(mine):
                largest = max(largest, abs(float(mine) - float(its)))
        flipped = [i for i, (mine, its) in enumerate(zip(row, expected[file], strict=True)) if mine != its]
        for index in (i for i in flipped if i and not _is_number(row[i])):  # a quadrant's label, then its classes'
            numbers = sorted((float(value) for value in _numbers_after(row, index)), reverse=True)
            if numbers[0] - numbers[1] > 2 * bound:
                raise SystemExit(f"{name} decides otherwise of {file}: {row[index]} for {expected[file][index]}")
    if largest > bound:
        raise SystemExit(f"{name} differs by {largest:.4f} on a probability; expected at most {bound}")
    return largest


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _numbers_after(row: list[str], index: int) -> list[str]:
    end = next((i for i in range(index + 1, len(row)) if not _is_number(row[i])), len(row))
    return row[index + 1 : end]


def race(peers: list[Peer], frames: Path, folder: Path, rounds: int) -> dict[str, Times]:
    """Give each peer a pass a round."""
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
    """Give a peer's figures by its name."""
    found: dict[str, dict[str, Any]] = {}
    for name, taken in times.items():
        precision = WAYS[name].precision
        rivals = [n for n in times if WAYS[n].precision == precision and not n.startswith("echoquad")]
        best = min(rivals, key=lambda rival: statistics.median(times[rival].wall), default=None)
        found[name] = {
            "title": WAYS[name].title,
            "precision": precision,
            "frames_per_second": frames / statistics.median(taken.wall),
            "of_document": paired_ratio(times[DOCUMENT].wall, taken.wall),
            "best_peer": best,
            "of_best_peer": paired_ratio(times[best].wall, taken.wall) if best else None,
            "cpu_ms_a_frame": 1e3 * statistics.median(taken.cpu) / frames,
            "max_abs_dp": agreement[name],
            "seconds": taken.wall,
        }
    return found


def table(kind: str, found: dict[str, dict[str, Any]]) -> list[list[str]]:
    header = ["peer", "files", "frames/s", "of the document's way", "of the best peer of its precision", "CPU ms", "dp"]
    return [header] + [
        [
            one["title"],
            kind,
            f"{one['frames_per_second']:.1f}",
            f"{one['of_document']:.2f}",
            "" if one["of_best_peer"] is None else f"{one['of_best_peer']:.2f}",
            "" if name.endswith("-process") else f"{one['cpu_ms_a_frame']:.1f}",
            f"{one['max_abs_dp']:.4f}",
        ]
        for name, one in found.items()
    ]


def verdict(kind: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """Say whether the aims are reached."""
    lines = []
    for precision, aim in AIMS.items():
        if (one := found.get(f"echoquad-{precision}")) is None:
            continue
        words = f"{kind}, EchoQuad {precision}: {one['of_document']:.2f} times the document's way"
        if kind == "rgb-png":
            words += f" (aim {aim:g})"
        if one["of_best_peer"] is not None:
            words += f", {one['of_best_peer']:.2f} of the best peer of its precision, {one['best_peer']} (aim 1)"
        lines.append(f"{words}.")
    return lines


if __name__ == "__main__":
    main()
