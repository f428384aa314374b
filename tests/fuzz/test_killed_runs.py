"""Killed runs: ``echoquad predict --out`` is killed at random moments and resumed until it is complete.

After every kill, the rows on disk are the first rows of an uninterrupted run, byte for byte. At the end, the file, the
exit code and the list of failures equal those of that run. ``pytest tests/fuzz -m slow`` kills a hundred times.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

FRAMES = 48
MAX_SECONDS = 60.0  # per run on a busy machine

ROW_ENDS = (b",cpu,fp32,\n", b'"typicality": null}\n', b"device,precision,typicality\n")
"""Ends of complete rows and of the header."""


@dataclass
class Count:
    """Counts of what the kills interrupted."""

    kills: int = 0
    midway: int = 0  # some rows were on disk, others not
    torn: int = 0  # the last row was incomplete
    runs: int = 0  # completed in the end


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of large frames, so that a run takes a while, with two unreadable ones and odd names."""
    folder = tmp_path_factory.mktemp("archive") / "frames"
    rng = np.random.default_rng(7)
    images = []
    for number in range(4):
        path = folder.parent / f"{number}.png"
        Image.fromarray(rng.integers(0, 60 * (number + 1), (1000, 1300), np.uint8)).save(path, compress_level=1)
        images.append(path.read_bytes())
    for index in range(FRAMES):
        path = folder / f"exam{index // 10}" / f'{"=-,"[index % 3]}{index:02d}\n".png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[index % 4] if index % 20 != 13 else b"no image")
    return folder


def start(bundle: Path, frames: Path, out: Path, *options: str, session: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "echoquad", "predict", bundle, frames, "--out", out, *options]
    environment = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=session,
    )


def failures(stderr: str) -> list[str]:
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("error[E_")]


@dataclass
class Uninterrupted:
    """An uninterrupted run: its file, its error lines, and its duration in seconds."""

    expected: bytes
    errors: list[str]
    seconds: float


Reference = Callable[[str], Uninterrupted]


@pytest.fixture(scope="module")
def reference(tiny_bundle: Path, frames: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Return a function that runs without interruption, once for each file format."""

    @functools.cache
    def run(extension: str) -> Uninterrupted:
        out = tmp_path_factory.mktemp("reference") / f"out.{extension}"
        begin = time.monotonic()
        process = start(tiny_bundle, frames, out)
        _, stderr = process.communicate(timeout=MAX_SECONDS)
        assert process.returncode == 5
        return Uninterrupted(out.read_bytes(), failures(stderr), time.monotonic() - begin)

    return run


class Killer:
    """Runs, kills and resumes runs over one folder, and checks what they leave."""

    def __init__(
        self,
        bundle: Path,
        frames: Path,
        scratch: Path,
        reference: Reference,
        extension: str,
        options: tuple[str, ...] = (),
    ) -> None:
        self._bundle, self._frames, self._options = bundle, frames, options
        self.out = scratch / f"out.{extension}"
        self.partial = scratch / f"out.{extension}.partial"
        run = reference(extension)
        self.expected, self.errors, self._seconds = run.expected, run.errors, run.seconds
        self.ends = {index + 1 for index in range(len(self.expected)) if self.expected.endswith(ROW_ENDS, 0, index + 1)}

    def kill(self, rng: random.Random, number: int, count: Count) -> None:
        """Resume the run and kill it at a random moment, unless it is complete by then."""
        before = self._size()
        process = start(self._bundle, self._frames, self.out, "--resume", *self._options)
        if number == signal.SIGKILL and rng.random() < 0.5:  # at any moment, including the start of Python
            self._wait(process, rng.uniform(0, self._seconds))
        else:  # while it writes rows
            self._wait(process, MAX_SECONDS, lambda: self._size() > max(before, min(self.ends)))
            self._wait(process, rng.uniform(0, self._seconds / 4))
        if process.poll() is None:
            process.send_signal(number)
            count.kills += 1
        self._check(process, number, count)

    def finish(self, count: Count) -> None:
        """Resume the run to its end."""
        self._check(start(self._bundle, self._frames, self.out, "--resume", *self._options), 0, count)

    def _check(self, process: subprocess.Popen[str], number: int, count: Count) -> None:
        _, stderr = process.communicate(timeout=MAX_SECONDS)
        if process.returncode == 5:
            assert self.out.read_bytes() == self.expected
            assert failures(stderr) == self.errors
            left = sorted(path.name for path in self.out.parent.glob("out.*"))
            assert left == [self.out.name, f"{self.out.name}.run.json"]
            self.out.unlink()
            count.runs += 1
            return
        # After the last row, the signal may end Python itself.
        assert process.returncode in (-number, 128 + number), stderr
        assert "a fault in EchoQuad" not in stderr
        assert not self.out.exists() or self.out.read_bytes() == self.expected
        rows = self.partial.read_bytes() if self.partial.exists() else b""
        assert self.expected.startswith(rows), "rows were lost, doubled, or changed"
        count.midway += min(self.ends) < len(rows) < len(self.expected)
        count.torn += len(rows) > 0 and len(rows) not in self.ends

    def _size(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0

    @staticmethod
    def _wait(process: subprocess.Popen[str], seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end and not until():
            time.sleep(0.002)


def kill_often(killer: Killer, number: int, kills: int, seed: int) -> Count:
    rng, count, midway = random.Random(seed), Count(), kills // 4
    # On a busy machine starting takes most of a run, so few of the random moments are between rows.
    while count.kills < kills or (count.midway < midway and count.kills < 10 * kills):
        killer.kill(rng, number, count)
    killer.finish(count)
    assert count.midway >= midway, "too few kills interrupted a run between rows"
    return count


@pytest.mark.parametrize(("extension", "options"), [("csv", ()), ("jsonl", ()), ("csv", ("--workers", "2"))])
def test_killed_run_resumes_to_the_same_bytes(
    extension: str, options: tuple[str, ...], tiny_bundle: Path, frames: Path, reference: Reference, tmp_path: Path
) -> None:
    killer = Killer(tiny_bundle, frames, tmp_path, reference, extension, options)
    count = kill_often(killer, signal.SIGKILL, 4, seed=1)
    assert count.runs >= 1


@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGKILL, False, -signal.SIGKILL)],
    ids=["Ctrl-C", "SIGTERM", "kill -9"],
)
def test_reader_processes_end_with_the_run(
    number: int,
    to_group: bool,
    code: int,
    tiny_bundle: Path,
    frames: Path,
    reference: Reference,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.csv"
    process = start(tiny_bundle, frames, out, "--workers", "2", session=True)
    end = time.monotonic() + MAX_SECONDS
    partial = out.with_name("out.csv.partial")
    while time.monotonic() < end and not (partial.exists() and partial.read_bytes().count(b"\n") > 2):
        time.sleep(0.002)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, stderr = process.communicate(timeout=MAX_SECONDS)
    assert process.returncode in (code, -number), stderr
    assert "Traceback" not in stderr
    end = time.monotonic() + 10
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < end, "a reader process outlives the run"
        time.sleep(0.01)
    resumed = start(tiny_bundle, frames, out, "--resume")
    resumed.communicate(timeout=MAX_SECONDS)
    assert resumed.returncode == 5
    assert out.read_bytes() == reference("csv").expected


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("extension", "number", "kills", "options"),
    [
        ("csv", signal.SIGKILL, 60, ()),
        ("jsonl", signal.SIGKILL, 40, ()),
        ("csv", signal.SIGKILL, 6, ("--overlay", "pictures")),
        ("csv", signal.SIGTERM, 25, ()),
        ("csv", signal.SIGINT, 25, ()),
        ("csv", signal.SIGKILL, 30, ("--workers", "2")),
        ("csv", signal.SIGTERM, 10, ("--workers", "2")),
        ("csv", signal.SIGINT, 10, ("--workers", "2")),
    ],
    ids=["csv", "jsonl", "overlays", "SIGTERM", "SIGINT", "workers", "workers SIGTERM", "workers SIGINT"],
)
def test_run_killed_many_times_resumes_to_the_same_bytes(
    extension: str,
    number: int,
    kills: int,
    options: tuple[str, ...],
    tiny_bundle: Path,
    frames: Path,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    count = kill_often(Killer(tiny_bundle, frames, tmp_path, reference, extension, options), number, kills, seed=2)
    record_property("kills", vars(count))
    if "--overlay" in options:  # every row on disk has its picture
        assert len([path for path in Path("pictures").rglob("*.overlay.png") if path.stat().st_size]) == FRAMES - 2


# ---------------------------------------------------------------------------------------------- tests of the harness


def test_harness_detects_doubled_and_lost_rows(
    tiny_bundle: Path, frames: Path, reference: Reference, tmp_path: Path
) -> None:
    killer = Killer(tiny_bundle, frames, tmp_path, reference, "csv")
    first, second, *rest = killer.expected.splitlines(keepends=True)
    for lines in ([first, second, second], [first, *rest[1:2]], [second]):
        killer.partial.write_bytes(b"".join(lines))
        process = subprocess.Popen(["sleep", "60"], stderr=subprocess.PIPE, encoding="utf-8")
        process.kill()
        with pytest.raises(AssertionError, match="lost, doubled, or changed"):
            killer._check(process, signal.SIGKILL, Count())
