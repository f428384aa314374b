"""Image fuzzing: a valid, damaged or malicious image file yields a frame or a one-line error.

A number identifies a file and the damage done to it (see ``image_corpus.py``). Each file is read in another process,
which must not die, hang or print:

- The result is a uint8 [H, W] frame or a FrameError with one printable line.
- A PNG, which has checksums, is refused or yields its original pixels. The other formats have none: the test counts
  how often they are accepted with other pixels.
- A file takes less than a time limit and a memory limit.

``pytest tests/fuzz/test_image_fuzzing.py -m slow`` reads 30 000 files, and the largest frames that are accepted.
"""

from __future__ import annotations

import collections
import csv
import io
import json
import os
import queue
import random
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.reader import decode_grey, decode_grey_and_flags

CORPUS = runpy.run_path(str(Path(__file__).with_name("image_corpus.py")))
SEEDS: dict[str, bytes] = CORPUS["SEEDS"]
UNSUPPORTED: dict[str, bytes] = CORPUS["UNSUPPORTED"]
Result = dict[str, Any]

HANG_SECONDS = 60.0
"""Seconds without an answer that count as a hang, even on a busy machine."""
MAX_SECONDS = 10.0
"""Limit per file; the slowest of the largest files takes one second."""
BOMB_MEMORY = 64 << 20
"""Bytes of additional memory that a decompression bomb may take."""
DAMAGED_MEMORY = 200 << 20
"""The same for a damaged file, whose header may state 36 million pixels of four bytes."""
LARGE_MEMORY = 600 << 20
"""The same for the largest frame: 36 million pixels in a file of 216 MB."""


class WorkerEnded(Exception):
    """The worker died or hung while reading a file."""


@contextmanager
def image_worker(scratch: Path, sabotage: str = "") -> Iterator[Callable[[dict[str, Any]], Result]]:
    """Start a process that reads image files, and yield a function that lets it read one."""
    program = Path(__file__).with_name("image_worker.py")
    command = [sys.executable, str(program)]
    if sabotage:
        begin = f"import sys; sys.path.insert(0, {str(program.parent)!r}); import image_worker\n"
        command = [sys.executable, "-c", f"{begin}{sabotage}\nimage_worker.main()"]
    stderr_file = scratch / "stderr.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    with stderr_file.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8", env=environment
        )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    answers: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in stdout:
            answers.put(line)
        answers.put("")

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    stdin.write(json.dumps({"scratch": str(scratch)}) + "\n")

    def read(what: dict[str, Any]) -> Result:
        stdin.write(json.dumps(what) + "\n")
        stdin.flush()
        try:
            answer = answers.get(timeout=HANG_SECONDS)
        except queue.Empty:
            raise WorkerEnded(f"{what}: no answer after {HANG_SECONDS} s") from None
        if not answer:
            raise WorkerEnded(
                f"{what}: the process ended with {process.wait()}\n{stderr_file.read_text('utf-8', 'replace')[-2000:]}"
            )
        return {**what, **json.loads(answer)}

    try:
        yield read
    finally:
        process.kill()
        process.wait()
        listener.join()
        stdin.close()
        stdout.close()


def read_all(what: Iterable[dict[str, Any]], scratch: Path, cap: int) -> list[Result]:
    """Read files in the worker, check that none shows a fault, and return the results."""
    with image_worker(scratch) as read:
        results = [read(item) for item in what]
    for result in results:
        if result["seconds"] > MAX_SECONDS:
            result["faults"].append(f"it took {result['seconds']} s")
        if (result["grown"] or 0) > cap:
            result["faults"].append(f"it took {result['grown'] >> 20} MB")
    wrong = [result for result in results if result["faults"]]
    assert wrong == [], "\n".join(json.dumps(result) for result in wrong)
    if sys.platform.startswith("linux"):  # elsewhere libtiff cannot be silenced
        assert (scratch / "stderr.txt").read_text("utf-8", "replace") == ""
    return results


def count_outcomes(results: list[Result]) -> dict[str, collections.Counter[str]]:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for result in results:
        file_format = "JPEG" if result["name"].startswith("MPO") else result["name"].split()[0]
        refused = result["outcome"].startswith("Frame")
        counts[file_format]["refused" if refused else result["outcome"]] += 1
    return counts


def check_damaged(numbers: range, scratch: Path) -> dict[str, collections.Counter[str]]:
    counts = count_outcomes(read_all(({"number": number} for number in numbers), scratch, DAMAGED_MEMORY))
    assert set(counts) == {"PNG", "JPEG", "BMP", "TIFF"}
    for file_format, count in counts.items():
        # Some files are accepted, as they would not be if nothing worked; most damage is detected.
        assert count["the same pixels"] > 0.03 * count.total(), (file_format, count)
        assert count["refused"] > 0.4 * count.total(), (file_format, count)
    return counts


# ---------------------------------------------------------------------------------------------- damage


def test_damaged_images_yield_frames_or_one_line_errors(tmp_path: Path) -> None:
    check_damaged(range(800), tmp_path)


@pytest.mark.slow
def test_thirty_thousand_damaged_images(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    counts = check_damaged(range(800, 30_800), tmp_path)
    record_property("outcomes", {file_format: dict(count) for file_format, count in counts.items()})


@pytest.mark.parametrize("name", SEEDS)
def test_valid_image_is_a_frame(name: str) -> None:
    frame, flags = decode_grey_and_flags(SEEDS[name])
    assert frame.dtype == np.uint8
    assert frame.ndim == 2
    np.testing.assert_array_equal(frame, decode_grey(SEEDS[name]))
    assert flags in ((), ("colour",))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_image_is_a_one_line_error(name: str) -> None:
    with pytest.raises(FrameError) as caught:
        decode_grey_and_flags(UNSUPPORTED[name])
    assert str(caught.value).isprintable()


CUTS = [name for name in SEEDS if "x" not in name and not name.startswith("JPEG profile")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "strips" in name or "16" in name else pytest.mark.slow) for name in CUTS]
)
def test_image_truncated_anywhere_never_yields_other_pixels(name: str) -> None:
    data = SEEDS[name]
    expected = decode_grey(data)
    for cut in range(len(data)):
        try:
            found = decode_grey(data[:cut])
        except FrameError:
            continue
        np.testing.assert_array_equal(found, expected)


def outcome(data: bytes) -> str | bytes:
    try:
        return decode_grey_and_flags(data)[0].tobytes()
    except FrameError as error:
        return str(error)


def test_decoding_is_thread_safe() -> None:
    files = [*SEEDS.values(), *UNSUPPORTED.values()]
    files += [CORPUS["damage"](data, random.Random(n))[0] for n, data in enumerate(SEEDS.values())]
    expected = [outcome(data) for data in files]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(outcome, files * 3)) == expected * 3


# ---------------------------------------------------------------------------------------------- decompression bombs


def test_decompression_bombs_take_little_memory(tmp_path: Path) -> None:
    results = read_all(({"bomb": name} for name in CORPUS["BOMBS"]), tmp_path, BOMB_MEMORY)
    accepted = {result["name"] for result in results if result["outcome"] == "accepted"}
    assert accepted == {"far more rows than stated", "TIFF that is its own next page"}  # of these, little is read
    assert max(result["bytes"] for result in results if "400 MB" in result["name"]) < 400_000


@pytest.mark.slow
def test_largest_frames_stay_within_limits(tmp_path: Path) -> None:
    results = read_all(({"bomb": name} for name in CORPUS["LARGEST"]), tmp_path, LARGE_MEMORY)
    assert {result["outcome"] for result in results} == {"accepted"}


# ---------------------------------------------------------------------------------------------- tests of the harness


@pytest.mark.parametrize(
    ("sabotage", "what", "faults"),
    [
        (
            "image_worker.read_grey_and_flags = lambda path: (image_worker.np.zeros((2, 2)), ())",
            {"number": 0},
            "float64 (2, 2) ()",
        ),
        ("image_worker.read_grey_and_flags = lambda path: 1 / 0", {"number": 0}, "ZeroDivisionError: division by zero"),
        (
            "def fail(path): raise image_worker.FrameError('a\\nb')\nimage_worker.read_grey_and_flags = fail",
            {"number": 0},
            "the message",
        ),
        (
            "image_worker.read_grey_and_flags = lambda path: (image_worker.np.zeros((2, 2), 'uint8'), ())",
            {"number": 1},
            "a PNG has other pixels",
        ),
    ],
)
def test_harness_detects_faults(sabotage: str, what: dict[str, Any], faults: str, tmp_path: Path) -> None:
    with image_worker(tmp_path, sabotage) as read:
        assert any(faults in fault for fault in read(what)["faults"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc has the peak")
def test_harness_measures_memory(tmp_path: Path) -> None:
    greedy = "keep = image_worker.read_grey_and_flags\n"
    greedy += "image_worker.read_grey_and_flags = lambda path: (b'x' * (100 << 20), keep(path))[1]"
    with image_worker(tmp_path, greedy) as read:
        assert read({"bomb": "one row of 2^31"})["grown"] > 90 << 20
    with image_worker(tmp_path) as read:
        assert read({"bomb": "one row of 2^31"})["grown"] < 5 << 20


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_harness_names_file_of_crash_and_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = "import os\nimage_worker.read_grey_and_flags = lambda path: os.kill(os.getpid(), 11)"
    with image_worker(tmp_path, dead) as read, pytest.raises(WorkerEnded, match=r"'number': 7.*-11"):
        read({"number": 7})
    monkeypatch.setitem(globals(), "HANG_SECONDS", 0.1)
    silent = "import time\nimage_worker.read_grey_and_flags = lambda path: time.sleep(600)"
    with image_worker(tmp_path, silent) as read, pytest.raises(WorkerEnded, match="no answer"):
        read({"number": 7})


# ---------------------------------------------------------------------------------------------- the command line


def predict(bundle: Path, folder: Path, out: Path) -> tuple[int, dict[str, dict[str, str]], str]:
    """Run the command and return its exit code, its rows by file, and its stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "echoquad", "predict", bundle, folder, "--out", out, "--device", "cpu"]
    ended = subprocess.run(
        command, check=False, env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8"
    )
    rows = list(csv.DictReader(io.StringIO(out.read_text("utf-8")))) if out.exists() else []
    assert len({row["file"] for row in rows}) == len(rows)
    return ended.returncode, {row["file"]: row for row in rows}, ended.stderr


EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "BMP": "bmp", "TIFF": "tif"}


def too_small(data: bytes) -> bool:
    return min(decode_grey(data).shape) < 2


def test_predict_decides_valid_images_among_damaged_ones_as_if_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    good_only, mixed = tmp_path / "good", tmp_path / "mixed"
    good = {
        f"{n:03}-good.{EXTENSIONS[name.split()[0]]}": data
        for n, (name, data) in enumerate(SEEDS.items())
        if not too_small(data)
    }
    # Those of several images are one file of several frames in a folder.
    unsupported = [data for name, data in UNSUPPORTED.items() if not name.startswith("animated")]
    broken = {f"{2 * n:03}-bad.png": data for n, data in enumerate(unsupported)}
    broken |= {f"{n:03}-small.png": data for n, data in enumerate(SEEDS.values()) if too_small(data)}
    rng = random.Random(5)
    for number, (name, data) in enumerate(SEEDS.items()):
        if name.startswith(("PNG", "JPEG")) and number % 3 == 0:
            broken[f"{number:03}-cut.tif"] = data[: rng.randrange(1, len(data) - 14)]
    for folder, files in ((good_only, good), (mixed, {**good, **broken})):
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
    (mixed / "folder.png").mkdir()
    expected_code, expected, _ = predict(tiny_bundle, good_only, tmp_path / "good.csv")
    code, rows, stderr = predict(tiny_bundle, mixed, tmp_path / "mixed.csv")
    assert (expected_code, code) == (0, 5)
    assert set(expected) == set(good)
    assert rows == expected
    assert list(rows) == sorted(good)
    for name in broken:
        assert stderr.count(name) == 1, (name, stderr)
    assert "Traceback" not in stderr
