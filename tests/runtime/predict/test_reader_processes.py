"""Tests of prediction with reader processes: same rows as with threads, whatever happens to a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import ConfigError, FrameCrashError, FrameTimeoutError, FrameTooLargeError
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.frames.isolation import reader_process
from echoquad_runtime.frames.isolation.reader_pool import reader_pool
from echoquad_runtime.frames.isolation.reader_process import ReaderProcess
from echoquad_runtime.predict import reader_count as module
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor

posix = pytest.mark.skipif(sys.platform == "win32", reason="uses POSIX signals")


@pytest.fixture
def folder(tmp_path: Path, make_frame: Callable[..., np.ndarray]) -> Path:
    """Return a folder of 40 frames, every seventh damaged."""
    found = tmp_path / "many"
    found.mkdir()
    for number in range(40):
        path = found / f"{number:03d}.png"
        Image.fromarray(make_frame(number, 60 + number % 5, 80)).save(path)
        if number % 7 == 3:
            path.write_bytes(path.read_bytes()[:-20])
    return found


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ReaderProcess]]:
    """Return the reader processes that the pool starts; it has none when the test begins and when it ends."""
    reader_pool().trim()
    found: list[ReaderProcess] = []
    init = ReaderProcess.__init__

    def record(self: ReaderProcess, *arguments: Any) -> None:
        init(self, *arguments)
        found.append(self)

    monkeypatch.setattr(ReaderProcess, "__init__", record)
    yield found
    reader_pool().trim()
    for reader in found:
        assert reader._child is None or reader._child.process.poll() is not None


def rows(results: Any) -> list[Any]:
    return [
        (one.file, type(one.error), str(one.error)) if isinstance(one, Failure) else one  # errors compare by identity
        for one in results
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_give_same_rows_as_threads(
    tiny_bundle: Path, folder: Path, started: list[ReaderProcess], workers: int
) -> None:
    expected = rows(Predictor(tiny_bundle, device="cpu", threads=2).predict(folder))
    assert started == []
    found = rows(Predictor(tiny_bundle, device="cpu", threads=2, workers=workers).predict(folder))
    assert len(started) == workers
    assert reader_pool().idle <= 2
    assert found == expected
    assert sum(isinstance(one, Prediction) for one in found) == 34


def test_gpu_predictor_reads_in_processes(
    cuda_stand_in: Any, tiny_bundle: Path, folder: Path, started: list[ReaderProcess]
) -> None:
    expected = [one.file for one in Predictor(tiny_bundle, device="cuda", threads=2).predict(folder)]
    found = list(Predictor(tiny_bundle, device="cuda", threads=2, workers=2, batch_size=3).predict(folder))
    assert [one.file for one in found] == expected
    assert len({one.probabilities for one in found if isinstance(one, Prediction)}) > 30
    assert len(started) == 2


def test_default_starts_processes_for_more_than_four_threads_and_many_files(
    tiny_bundle: Path, folder: Path, started: list[ReaderProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(**options: Any) -> int:
        reader_pool().trim()
        started.clear()
        assert len(list(Predictor(tiny_bundle, device="cpu", **options).predict(folder))) == 40
        return len(started)

    assert opened(threads=4) == 0
    assert opened(threads=5) == 5  # 40 files: 8 per process
    assert opened(threads=6) == 0
    assert opened(threads=6, workers=0) == 0
    assert opened(threads=6, workers=1) == 1
    monkeypatch.setattr(module, "FILES_PER_READER", 6)
    assert opened(threads=6) == 6


def test_frames_in_memory_and_few_files_start_no_process(
    tiny_bundle: Path, folder: Path, started: list[ReaderProcess], make_frame: Callable[..., np.ndarray]
) -> None:
    predictor = Predictor(tiny_bundle, device="cpu", threads=2, workers=2)
    assert len(list(predictor.predict_frames(make_frame(seed) for seed in range(9)))) == 9
    assert len(list(predictor.predict_encoded((path.name, path.read_bytes()) for path in folder.iterdir()))) == 40
    assert len(list(predictor.predict([folder / "000.png", folder / "001.png"]))) == 2
    assert started == []


@pytest.mark.parametrize("workers", [-1, 513])
def test_workers_out_of_range_raises(tiny_bundle: Path, workers: int) -> None:
    with pytest.raises(ConfigError, match=f"workers is {workers}; expected 0 to 512"):
        Predictor(tiny_bundle, workers=workers)


@posix
def test_killed_process_loses_no_row(tiny_bundle: Path, folder: Path, started: list[ReaderProcess]) -> None:
    expected = rows(Predictor(tiny_bundle, device="cpu", threads=2).predict(folder))
    found = []
    results = Predictor(tiny_bundle, device="cpu", threads=2, workers=2).predict(folder)
    for number, one in enumerate(results):
        found.append(one)
        if number % 5 == 0 and (pid := started[number % 2].pid) is not None:
            os.kill(pid, signal.SIGKILL)
    assert rows(found) == expected


# Faults of the process, by the name of the file.
FAULTS = """
import os, time
from echoquad_runtime.frames.isolation import reader_main
perform = reader_main._perform

def replaced(request, data):
    name = os.path.basename(request["path"])
    if "abort" in name:
        os.abort()
    if "hang" in name:
        time.sleep(600)
    if "memory" in name:
        raise MemoryError
    return perform(request, data)

reader_main._perform = replaced
main(settings)
"""


@posix
@pytest.mark.parametrize("workers", [None, 2])
def test_each_file_that_ends_its_process_is_one_failure_among_good_rows(
    tiny_bundle: Path, folder: Path, started: list[ReaderProcess], monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    monkeypatch.setattr(reader_process, "_PROGRAM", reader_process._PROGRAM.replace("main(settings)\n", FAULTS))
    picture = Image.open(folder / "000.png")
    for number in range(0, 40, 8):
        for fault in ("abort", "memory", *(["hang"] if number % 16 == 0 else [])):
            picture.save(folder / f"{number:03d}-{fault}.tif")
    failed = {"abort": FrameCrashError, "memory": FrameTooLargeError, "hang": FrameTimeoutError}
    begin = time.monotonic()
    found = list(Predictor(tiny_bundle, device="cpu", threads=2, workers=workers, time_limit=1.0).predict(folder))
    assert time.monotonic() - begin < 40
    assert [Path(one.file).name for one in found] == sorted(path.name for path in folder.iterdir())
    for one in found:
        fault = one.file.partition("-")[2].removesuffix(".tif")
        assert isinstance(one, Failure if fault or int(one.file[:3]) % 7 == 3 else Prediction), one
        if fault:
            assert isinstance(one, Failure) and type(one.error) is failed[fault]
    for thread in threading.enumerate():  # no worker stays with a file that hangs
        if thread.name == "echoquad-worker":
            thread.join(5)
            assert not thread.is_alive()


@posix
def test_interrupted_run_does_not_wait_for_a_hanging_file(
    tiny_bundle: Path, folder: Path, started: list[ReaderProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_process, "_PROGRAM", reader_process._PROGRAM.replace("main(settings)\n", FAULTS))
    Image.open(folder / "000.png").save(folder / "030-hang.tif")
    results = Predictor(tiny_bundle, device="cpu", threads=2).predict(folder)
    for _ in range(28):
        next(results)
    begin = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 3


def test_closing_the_iterator_ends_all_processes(tiny_bundle: Path, folder: Path, started: list[ReaderProcess]) -> None:
    results = Predictor(tiny_bundle, device="cpu", threads=2, workers=2).predict(folder)
    next(results)
    begin = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 4
    assert len(started) == 2


SCRIPT = """
import sys
from echoquad_runtime.predict.predictor import Predictor
results = list(Predictor(sys.argv[1], device="cpu", workers=2).predict(sys.argv[2]))
print(len(results))
"""


def test_script_without_main_guard_can_use_processes(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    """With `multiprocessing`, every process would run the script again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, script, tiny_bundle, folder], capture_output=True, text=True, timeout=60, check=True
    )
    assert (ended.stdout, ended.stderr) == ("40\n", "")
