"""Tests of the pool of reader processes: lending, clips, forks, leaks, and the end of the process."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.errors import FrameCrashError, FrameReadError, FrameTimeoutError
from echoquad_runtime.frames.isolation import reader_process
from echoquad_runtime.frames.isolation.messages import Request
from echoquad_runtime.frames.isolation.reader_pool import ReaderPool, reader_pool

# Without pixels, so that a request takes no longer than its fault.
FAULTS = """
import os, time
from echoquad_runtime.frames.isolation import reader_main
log = []

def perform(request, data):
    name = os.path.basename(request["path"])
    log.append(name)
    if name == "abort":
        os.abort()
    time.sleep({"slow": 0.3, "hang": 60}.get(name, 0.01))
    return {"pixel_format": f"{os.getpid()} {','.join(log)}"}, None

reader_main._perform = perform
main(settings)
"""

posix = pytest.mark.skipif(sys.platform == "win32", reason="uses POSIX signals")
linux = pytest.mark.skipif(sys.platform != "linux", reason="uses /proc")


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ReaderPool]:
    monkeypatch.setattr(reader_process, "_PROGRAM", reader_process._PROGRAM.replace("main(settings)\n", FAULTS))
    opened = ReaderPool()
    yield opened
    opened.close()
    assert opened.idle == 0


def ask(pool: ReaderPool, name: str, **options: Any) -> tuple[int, list[str]]:
    """Return the process ID and the files that the process has read."""
    pid, _, files = pool.ask(Request("pixel_format", Path("/nowhere", name)), **options).pixel_format.partition(" ")
    return int(pid), files.split(",")


def test_one_process_serves_one_thread(pool: ReaderPool) -> None:
    assert len({ask(pool, str(number))[0] for number in range(10)}) == 1
    assert pool.idle == 1


def test_threads_read_at_the_same_time(pool: ReaderPool) -> None:
    with ThreadPoolExecutor(4) as threads:
        pids = {pid for pid, _ in threads.map(lambda _: ask(pool, "slow"), range(8))}
    assert len(pids) == pool.idle == 4
    pool.trim(1)
    assert pool.idle == 1 and ask(pool, "a")[0] in pids


def test_clip_is_read_by_the_process_that_has_it_open(pool: ReaderPool) -> None:
    with ThreadPoolExecutor(6) as threads:
        jobs = [(name, name.startswith("clip")) for name in ["clip1", "a", "clip2", "slow"] * 12]
        found = list(threads.map(lambda job: (job[0], ask(pool, job[0], clip=job[1])[0]), jobs))
    for clip in ("clip1", "clip2"):
        assert len({pid for name, pid in found if name == clip}) == 1
    assert len({pid for _, pid in found}) > 2


def test_other_files_leave_the_process_of_a_clip_alone_where_they_can(pool: ReaderPool) -> None:
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: ask(pool, "slow"), range(2)))
    home, _ = ask(pool, "clip", clip=True)
    assert home not in {ask(pool, str(number))[0] for number in range(5)}
    assert ask(pool, "clip", clip=True)[0] == home


@posix
def test_clip_moves_to_a_new_process_if_its_own_dies(pool: ReaderPool) -> None:
    first, _ = ask(pool, "clip", clip=True)
    with pytest.raises(FrameCrashError):
        ask(pool, "abort")
    second, files = ask(pool, "clip", clip=True)
    assert second != first and files == ["clip"]


@posix
def test_many_files_that_end_their_process(pool: ReaderPool) -> None:
    ask(pool, "a")
    before, threads = descriptors(), threading.active_count()
    begin = time.monotonic()

    def read(number: int) -> str:
        try:
            return str(ask(pool, "abort" if number % 4 else "good")[1])
        except FrameCrashError as error:
            return error.code

    with ThreadPoolExecutor(2) as executor:
        found = list(executor.map(read, range(16)))
    assert [code == "E_FRAME_CRASH" for code in found] == [number % 4 != 0 for number in range(16)]
    assert time.monotonic() - begin < 60
    pool.trim(1)
    assert len(descriptors()) <= len(before) and threading.active_count() == threads
    if sys.platform == "linux":
        assert zombies() == []


def descriptors() -> list[str]:
    gc.collect()
    return [path.name for path in Path("/proc/self/fd").iterdir()] if sys.platform == "linux" else []


def zombies() -> list[str]:
    found = []
    for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in child.read_text().split():
            status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found += [pid] if status == "Z" else []
    return found


@posix
def test_file_whose_frames_keep_ending_their_process_is_given_up(pool: ReaderPool) -> None:
    def outcome(name: str, frame: int | None) -> str:
        try:
            pool.ask(Request("pixel_format", Path("/nowhere", name), frame=frame))
        except FrameCrashError as error:
            return "not tried" if "not tried" in str(error) else "crash"
        return "read"

    assert [outcome("abort", number) for number in range(1, 7)] == ["crash"] * 3 + ["not tried"] * 3
    assert outcome("other", 1) == "read"
    assert outcome("abort", None) == "crash"
    pool.trim()
    assert outcome("abort", 9) == "crash"


def test_stop_ends_what_a_thread_reads(pool: ReaderPool) -> None:
    errors: list[Exception] = []

    def read() -> None:
        try:
            ask(pool, "hang")
        except FrameReadError as error:
            errors.append(error)

    ask(pool, "a")
    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.2)
    assert pool.is_reading(thread) and not pool.is_reading(threading.main_thread())
    pool.stop([thread, threading.main_thread()])
    thread.join(5)
    assert not thread.is_alive() and "stopped" in str(errors[0])
    assert not pool.is_reading(thread)
    assert ask(pool, "a")[1] == ["a"]


def test_start_is_counted(pool: ReaderPool) -> None:
    pool.start(2)
    pool.start(2)
    assert pool.idle == 2
    ask(pool, "a")
    assert pool.idle == 2


def test_time_limit(pool: ReaderPool) -> None:
    ask(pool, "a")
    begin = time.monotonic()
    with pytest.raises(FrameTimeoutError):
        ask(pool, "hang", time_limit=0.3)
    assert time.monotonic() - begin < 3


FORKED = """
import io, os, sys
import numpy as np
from PIL import Image
from echoquad_runtime.frames.isolation.reader_pool import reader_pool
from echoquad_runtime.frames.reader import decode_grey
stream = io.BytesIO()
Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)).save(stream, "TIFF")
expected = decode_grey(stream.getvalue()).tobytes()
mine = reader_pool()._idle[0].pid
pid = os.fork()
assert decode_grey(stream.getvalue()).tobytes() == expected
other = reader_pool()._idle[0].pid
assert (other == mine) == (pid != 0), "a forked process reads through the pipes of its parent"
if pid:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert decode_grey(stream.getvalue()).tobytes() == expected
    print(mine)
"""


@linux
def test_forked_process_has_a_pool_of_its_own_and_all_end() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKED], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not Path(f"/proc/{ended.stdout.strip()}").exists()


def test_module_pool_is_one() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(stream, "TIFF")
    answer = reader_pool().ask(Request("grey", data=stream.getvalue()))
    assert answer.levels is not None and answer.levels.shape == (8, 8)
    assert reader_pool() is reader_pool()
