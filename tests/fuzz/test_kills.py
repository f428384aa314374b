"""Kills: ``echoquad predict --out`` killed at random moments and gone on with, again and again, until it is done.

After every kill the rows that are there are the first of an uninterrupted run's, byte for byte; at the end the file is
that run's, and so are the exit code and the list of failures. ``pytest tests/fuzz -m slow`` kills a hundred times.
"""

from __future__ import annotations

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
SECONDS = 60.0  # a run may take on a busy machine

LAST = (b",cpu,fp32\n", b'"precision": "fp32"}\n', b"flags,device,precision\n")
"""What whole rows, and the header, end with."""


@dataclass
class Count:
    """What the kills have met."""

    kills: int = 0
    midway: int = 0  # some rows were there, and some were not
    torn: int = 0  # the last row was not whole
    runs: int = 0  # that came to their end, at last


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder of large frames, so that a run takes its time, with two bad ones and odd names among them."""
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
        # A test run in a shell's background has SIGINT ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def failures(stderr: str) -> list[str]:
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("error[E_")]


class Killer:
    """Runs, kills, and goes on with runs over one folder, and looks at what they leave."""

    def __init__(self, bundle: Path, frames: Path, scratch: Path, ending: str, options: tuple[str, ...] = ()) -> None:
        self._bundle, self._frames, self._options = bundle, frames, options
        self.out = scratch / f"out.{ending}"
        self.partial = scratch / f"out.{ending}.partial"
        reference = scratch / f"whole.{ending}"
        begin = time.monotonic()
        process = start(bundle, frames, reference, *options)
        _, stderr = process.communicate(timeout=SECONDS)
        self._seconds = time.monotonic() - begin
        assert process.returncode == 5
        self.errors = failures(stderr)
        self.expected = reference.read_bytes()
        self.ends = {index + 1 for index in range(len(self.expected)) if self.expected.endswith(LAST, 0, index + 1)}

    def kill(self, rng: random.Random, number: int, count: Count) -> None:
        """Go on with the run, and kill it at a moment by chance, should it not be done by then."""
        before = self._size()
        process = start(self._bundle, self._frames, self.out, "--resume", *self._options)
        if number == signal.SIGKILL and rng.random() < 0.5:  # any moment, Python's own start included
            self._wait(process, rng.uniform(0, self._seconds))
        else:  # while it writes
            self._wait(process, SECONDS, lambda: self._size() > max(before, min(self.ends)))
            self._wait(process, rng.uniform(0, self._seconds / 4))
        if process.poll() is None:
            process.send_signal(number)
            count.kills += 1
        self._look(process, number, count)

    def finish(self, count: Count) -> None:
        """Go on with the run to its end."""
        self._look(start(self._bundle, self._frames, self.out, "--resume", *self._options), 0, count)

    def _look(self, process: subprocess.Popen[str], number: int, count: Count) -> None:
        _, stderr = process.communicate(timeout=SECONDS)
        if process.returncode == 5:
            assert self.out.read_bytes() == self.expected
            assert failures(stderr) == self.errors
            left = sorted(path.name for path in self.out.parent.glob("out.*"))
            assert left == [self.out.name, f"{self.out.name}.run.json"]
            self.out.unlink()
            count.runs += 1
            return
        # Once all is done, Python itself dies of the signal.
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
    rng, count = random.Random(seed), Count()
    while count.kills < kills:
        killer.kill(rng, number, count)
    killer.finish(count)
    assert count.midway >= kills // 4, "too few of the kills met a run at its work"
    return count


@pytest.mark.parametrize(("ending", "options"), [("csv", ()), ("jsonl", ()), ("csv", ("--workers", "2"))])
def test_kills(ending: str, options: tuple[str, ...], tiny_bundle: Path, frames: Path, tmp_path: Path) -> None:
    count = kill_often(Killer(tiny_bundle, frames, tmp_path, ending, options), signal.SIGKILL, 5, seed=1)
    assert count.runs >= 1


@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGKILL, False, -signal.SIGKILL)],
    ids=["Ctrl-C", "SIGTERM", "kill -9"],
)
def test_reader_processes_end_with_the_run(
    number: int, to_all: bool, code: int, tiny_bundle: Path, frames: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    process = start(tiny_bundle, frames, out, "--workers", "2", session=True)
    end = time.monotonic() + SECONDS
    partial = out.with_name("out.csv.partial")
    while time.monotonic() < end and not (partial.exists() and partial.read_bytes().count(b"\n") > 2):
        time.sleep(0.002)
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, stderr = process.communicate(timeout=SECONDS)
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
    for file, options in ((out, ["--resume"]), (tmp_path / "whole.csv", [])):
        again = start(tiny_bundle, frames, file, *options)
        again.communicate(timeout=SECONDS)
        assert again.returncode == 5
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("ending", "number", "kills", "options"),
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
def test_many_kills(
    ending: str,
    number: int,
    kills: int,
    options: tuple[str, ...],
    tiny_bundle: Path,
    frames: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    count = kill_often(Killer(tiny_bundle, frames, tmp_path, ending, options), number, kills, seed=2)
    record_property("kills", vars(count))
    if "--overlay" in options:  # a row that is there has its picture
        assert len([path for path in Path("pictures").rglob("*.overlay.png") if path.stat().st_size]) == FRAMES - 2


# ---------------------------------------------------------------------------------------------- the test of the test


def test_a_row_that_is_doubled_is_found_out(tiny_bundle: Path, frames: Path, tmp_path: Path) -> None:
    killer = Killer(tiny_bundle, frames, tmp_path, "csv")
    first, second, *rest = killer.expected.splitlines(keepends=True)
    for lines in ([first, second, second], [first, *rest[1:2]], [second]):
        killer.partial.write_bytes(b"".join(lines))
        process = subprocess.Popen(["sleep", "60"], stderr=subprocess.PIPE, encoding="utf-8")
        process.kill()
        with pytest.raises(AssertionError, match="lost, doubled, or changed"):
            killer._look(process, signal.SIGKILL, Count())
