"""Image files, whole, broken and malicious: each is a frame, or one line that says why not.

A number stands for a whole file of some kind and what was done to it (see ``pictures.py``). Each is read in a process
of its own, which may neither die, nor hang, nor print:

- Whatever comes out is a uint8 [H, W] frame or a FrameError of one printable line.
- A PNG, which has checksums, is refused or shows the pixels that it had. The other kinds have none: how often they
  were accepted with other pixels is counted.
- A file takes no longer than a bound, and no more memory than a cap.

``pytest tests/fuzz/test_images.py -m slow`` goes through 30 000, and through the largest frames that are read at all.
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
from echoquad_runtime.frames.reader import decode_checked, decode_frame

PICTURES = runpy.run_path(str(Path(__file__).with_name("pictures.py")))
SEEDS: dict[str, bytes] = PICTURES["SEEDS"]
BAD: dict[str, bytes] = PICTURES["BAD"]
Result = dict[str, Any]

SILENCE = 60.0
"""Seconds after which a file that was not answered for counts as a hang, on however busy a machine."""
SECONDS = 10.0
"""What a file may take; the slowest of the largest takes one."""
BOMB_CAP = 64 << 20
"""Bytes of memory that a bomb may take beside what the process has."""
DAMAGED_CAP = 200 << 20
"""The same for a damaged file, whose header may announce 36 million pixels of four bytes, and hold a few of them."""
LARGE_CAP = 600 << 20
"""The same for the largest frame: 36 million pixels, in a file of 216 MB."""


class Ended(Exception):
    """The reader died, or went silent, over a file."""


@contextmanager
def reader(scratch: Path, sabotage: str = "") -> Iterator[Callable[[dict[str, Any]], Result]]:
    """Start a process that reads image files; gives a function that has it read one."""
    program = Path(__file__).with_name("reader.py")
    command = [sys.executable, str(program)]
    if sabotage:
        begin = f"import sys; sys.path.insert(0, {str(program.parent)!r}); import reader\n"
        command = [sys.executable, "-c", f"{begin}{sabotage}\nreader.main()"]
    said = scratch / "stderr.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    with said.open("wb") as stderr:
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
            answer = answers.get(timeout=SILENCE)
        except queue.Empty:
            raise Ended(f"{what}: no answer after {SILENCE} s") from None
        if not answer:
            raise Ended(
                f"{what}: the process ended with {process.wait()}\n{said.read_text('utf-8', 'replace')[-2000:]}"
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


def go_through(what: Iterable[dict[str, Any]], scratch: Path, cap: int) -> list[Result]:
    """Have files read; none may show a fault. Gives the results."""
    with reader(scratch) as read:
        results = [read(item) for item in what]
    for result in results:
        if result["seconds"] > SECONDS:
            result["faults"].append(f"it took {result['seconds']} s")
        if (result["grown"] or 0) > cap:
            result["faults"].append(f"it took {result['grown'] >> 20} MB")
    wrong = [result for result in results if result["faults"]]
    assert wrong == [], "\n".join(json.dumps(result) for result in wrong)
    if sys.platform.startswith("linux"):  # elsewhere libtiff cannot be silenced
        assert (scratch / "stderr.txt").read_text("utf-8", "replace") == ""
    return results


def tally(results: list[Result]) -> dict[str, collections.Counter[str]]:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for result in results:
        kind = "JPEG" if result["name"].startswith("MPO") else result["name"].split()[0]
        refused = result["outcome"].startswith("Frame")
        counts[kind]["refused" if refused else result["outcome"]] += 1
    return counts


def check_damaged(numbers: range, scratch: Path) -> dict[str, collections.Counter[str]]:
    counts = tally(go_through(({"number": number} for number in numbers), scratch, DAMAGED_CAP))
    assert set(counts) == {"PNG", "JPEG", "BMP", "TIFF"}
    for kind, count in counts.items():
        # Neither is everything refused, as it would be if nothing worked, nor is damage passed over.
        assert count["the same pixels"] > 0.03 * count.total(), (kind, count)
        assert count["refused"] > 0.4 * count.total(), (kind, count)
    return counts


# ---------------------------------------------------------------------------------------------- damage


def test_damaged_files(tmp_path: Path) -> None:
    check_damaged(range(1500), tmp_path)


@pytest.mark.slow
def test_thirty_thousand_damaged_files(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    counts = check_damaged(range(1500, 31_500), tmp_path)
    record_property("outcomes", {kind: dict(count) for kind, count in counts.items()})


@pytest.mark.parametrize("name", SEEDS)
def test_a_whole_file_is_a_frame(name: str) -> None:
    frame, flags = decode_checked(SEEDS[name])
    assert frame.dtype == np.uint8
    assert frame.ndim == 2
    np.testing.assert_array_equal(frame, decode_frame(SEEDS[name]))
    assert flags in ((), ("colour",))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(name: str) -> None:
    with pytest.raises(FrameError) as caught:
        decode_checked(BAD[name])
    assert str(caught.value).isprintable()


CUTS = [name for name in SEEDS if "x" not in name and not name.startswith("JPEG profile")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "strips" in name or "16" in name else pytest.mark.slow) for name in CUTS]
)
def test_a_file_cut_anywhere_shows_no_other_pixels(name: str) -> None:
    data = SEEDS[name]
    whole = decode_frame(data)
    for cut in range(len(data)):
        try:
            found = decode_frame(data[:cut])
        except FrameError:
            continue
        np.testing.assert_array_equal(found, whole)


def outcome(data: bytes) -> str | bytes:
    try:
        return decode_checked(data)[0].tobytes()
    except FrameError as error:
        return str(error)


def test_threads_do_not_disturb_each_other() -> None:
    files = [*SEEDS.values(), *BAD.values()]
    files += [PICTURES["damage"](data, random.Random(n))[0] for n, data in enumerate(SEEDS.values())]
    expected = [outcome(data) for data in files]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(outcome, files * 3)) == expected * 3


# ---------------------------------------------------------------------------------------------- bombs


def test_bombs(tmp_path: Path) -> None:
    results = go_through(({"bomb": name} for name in PICTURES["BOMBS"]), tmp_path, BOMB_CAP)
    accepted = {result["name"] for result in results if result["outcome"] == "accepted"}
    assert accepted == {"far more rows than announced", "TIFF that is its own next page"}  # of which little is read
    assert max(result["bytes"] for result in results if "400 MB" in result["name"]) < 400_000


@pytest.mark.slow
def test_the_largest_frames(tmp_path: Path) -> None:
    results = go_through(({"bomb": name} for name in PICTURES["HEAVY"]), tmp_path, LARGE_CAP)
    assert {result["outcome"] for result in results} == {"accepted"}


# ---------------------------------------------------------------------------------------------- the test of the test


@pytest.mark.parametrize(
    ("sabotage", "what", "faults"),
    [
        ("reader.read_checked = lambda path: (reader.np.zeros((2, 2)), ())", {"number": 0}, "float64 (2, 2) ()"),
        ("reader.read_checked = lambda path: 1 / 0", {"number": 0}, "ZeroDivisionError: division by zero"),
        ("def fail(path): raise reader.FrameError('a\\nb')\nreader.read_checked = fail", {"number": 0}, "the message"),
        (
            "reader.read_checked = lambda path: (reader.np.zeros((2, 2), 'uint8'), ())",
            {"number": 1},
            "a PNG's pixels are not as they were",
        ),
    ],
)
def test_what_must_not_be_is_found_out(sabotage: str, what: dict[str, Any], faults: str, tmp_path: Path) -> None:
    with reader(tmp_path, sabotage) as read:
        assert any(faults in fault for fault in read(what)["faults"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_memory_is_measured(tmp_path: Path) -> None:
    greedy = "keep = reader.read_checked\nreader.read_checked = lambda path: (b'x' * (100 << 20), keep(path))[1]"
    with reader(tmp_path, greedy) as read:
        assert read({"bomb": "one row of 2^31"})["grown"] > 90 << 20
    with reader(tmp_path) as read:
        assert read({"bomb": "one row of 2^31"})["grown"] < 5 << 20


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_crash_and_a_hang_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = "import os\nreader.read_checked = lambda path: os.kill(os.getpid(), 11)"
    with reader(tmp_path, dead) as read, pytest.raises(Ended, match=r"'number': 7.*-11"):
        read({"number": 7})
    monkeypatch.setitem(globals(), "SILENCE", 0.1)
    silent = "import time\nreader.read_checked = lambda path: time.sleep(600)"
    with reader(tmp_path, silent) as read, pytest.raises(Ended, match="no answer"):
        read({"number": 7})


# ---------------------------------------------------------------------------------------------- the command line


def predict(bundle: Path, folder: Path, out: Path) -> tuple[int, dict[str, dict[str, str]], str]:
    """Run the real command; gives its exit code, its rows by file, and what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "echoquad", "predict", bundle, folder, "--out", out, "--device", "cpu"]
    ended = subprocess.run(
        command, check=False, env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8"
    )
    rows = list(csv.DictReader(io.StringIO(out.read_text("utf-8")))) if out.exists() else []
    assert len({row["file"] for row in rows}) == len(rows)
    return ended.returncode, {row["file"]: row for row in rows}, ended.stderr


ENDINGS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "BMP": "bmp", "TIFF": "tif"}


def too_small(data: bytes) -> bool:
    return min(decode_frame(data).shape) < 2


def test_good_files_among_bad_ones_are_judged_as_if_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    good_only, mixed = tmp_path / "good", tmp_path / "mixed"
    good = {
        f"{n:03}-good.{ENDINGS[name.split()[0]]}": data
        for n, (name, data) in enumerate(SEEDS.items())
        if not too_small(data)
    }
    broken = {f"{2 * n:03}-bad.png": data for n, data in enumerate(BAD.values())}
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
    code, rows, said = predict(tiny_bundle, mixed, tmp_path / "mixed.csv")
    assert (expected_code, code) == (0, 5)
    assert set(expected) == set(good)
    assert rows == expected
    assert list(rows) == sorted(good)
    for name in broken:
        assert said.count(name) == 1, (name, said)
    assert "Traceback" not in said
