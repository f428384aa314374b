"""Scaling of `echoquad predict` with the number of frames and of threads, on Linux and macOS.

    python benchmarks/scaling.py BUNDLE [--frames FOLDER] [--counts 1,10,100,1000,20000] [--results FILE]

Times are those of whole processes, start included; for the comparison of threads, the time for one frame is subtracted.
Cores kept busy is CPU time over wall time; it must not exceed `--threads`.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import FORMATS, Ran, arguments, link_tree, make_frames, report, rotated, run_process

from echoquad_runtime.bundle.bundle import Bundle

MOST_BUSY = 1.05  # allowed cores kept busy over `--threads`


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--counts", default="1,10,100,1000,20000", help="frames per tree (default %(default)s)")
    parser.add_argument(
        "--each", type=int, default=1000, help="frames for the comparison of threads (default %(default)s)"
    )
    parser.add_argument("--format", choices=list(FORMATS), default="l-png")
    parser.add_argument("--size", default="800x600", help="width and height of a frame (default %(default)s)")
    parser.add_argument("--precision", help="default: that of the bundle")
    options = parser.parse_args()

    precision = options.precision or Bundle(options.bundle).default_precision
    counts = sorted(map(int, options.counts.split(",")))
    width, height = map(int, options.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        frames = make_frames(work / "frames", options.format, options.count, options.frames, (width, height))
        for count in {1, options.each, *counts}:
            link_tree(work / str(count), frames, count)

        def predict(count: int, threads: int) -> Ran:
            line = ["-m", "echoquad", "predict", options.bundle, work / str(count), "--out", work / "rows.csv"]
            line += ["--threads", str(threads), "--precision", precision, "--device", "cpu", "--untuned"]
            ran = run_process(*line)
            (work / "rows.csv").unlink()
            return ran

        predict(1, options.threads)  # warms the disk cache
        sizes = [(count, predict(count, options.threads)) for count in counts]
        threads = compare_threads(predict, options.each, range(1, options.threads + 1), options.rounds)

    record = {
        "precision": precision,
        "size": options.size,
        "counts": [{"frames": n, "seconds": r.seconds, "cpu_s": r.cpu, "peak_mb": r.peak_mb} for n, r in sizes],
        "threads": threads,
    }
    over = [str(one["threads"]) for one in threads if one["cores"] > MOST_BUSY * one["threads"]]
    notes = [
        f"{precision}, frames of {options.size}, {options.format}; {options.rounds} rounds to compare threads.",
        f"More cores busy than --threads: {'at ' + ', '.join(over) + ' threads' if over else 'never'} "
        f"(tolerance: {MOST_BUSY}).",
    ]
    report("scaling", table(sizes, threads, options), record, options.results, threads=options.threads, notes=notes)


def compare_threads(predict: Any, count: int, numbers: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Time each number of threads in each round; return frames per second beyond the first frame."""
    taken: dict[int, list[tuple[float, float]]] = {number: [] for number in numbers}
    for turn in range(rounds):
        for number in rotated(numbers, turn):
            one, many = predict(1, number), predict(count, number)
            taken[number].append(((many.seconds - one.seconds) / (count - 1), many.cpu / many.seconds))
    return parallel(taken)


def parallel(taken: dict[int, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Return medians and the parallel efficiency: frames per second over threads times those of one thread."""
    found = []
    for number, pairs in taken.items():
        seconds = statistics.median(pair[0] for pair in pairs)
        found.append({"threads": number, "fps": 1 / seconds, "cores": max(pair[1] for pair in pairs)})
    for one in found:
        one["efficiency"] = one["fps"] / (one["threads"] * found[0]["fps"])
    return found


def table(sizes: Sequence[tuple[int, Ran]], threads: Sequence[dict[str, Any]], options: Any) -> list[list[str]]:
    rows = [["", "seconds", "ms a frame", "frames/s", "cores kept busy", "peak MB", "parallel efficiency"]]
    for count, ran in sizes:
        rows.append(
            [
                f"{count} frame{'s' * (count > 1)}, {options.threads} thread{'s' * (options.threads > 1)}",
                f"{ran.seconds:.2f}",
                f"{1e3 * ran.seconds / count:.2f}",
                f"{count / ran.seconds:.1f}",
                f"{ran.cpu / ran.seconds:.2f}",
                f"{ran.peak_mb:.0f}",
                "",
            ]
        )
    for one in threads:
        name = f"{one['threads']} thread{'s' * (one['threads'] > 1)}, without start"
        rate = f"{one['fps']:.1f}"
        rows.append([name, "", f"{1e3 / one['fps']:.2f}", rate, f"{one['cores']:.2f}", "", f"{one['efficiency']:.3f}"])
    return rows


if __name__ == "__main__":
    main()
