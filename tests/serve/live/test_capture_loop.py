"""The loop that keeps a source captured: sources that block, are silent, die, freeze or end; and what is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from echoquad_runtime.errors import ConfigError
from echoquad_serve.errors import LiveSourceError
from echoquad_serve.live.capture import Capture, CapturedFrame, Picture, check_source
from echoquad_serve.live.capture_loop import CaptureLoop, Patience
from echoquad_serve.live.newest_frame import LiveFrame

pytest.importorskip("av")
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at processes in /proc")

QUICK = Patience(first_frame=5.0, first_pause=0.05, longest_pause=0.2)


class Recorder:
    """A loop and what it tells, with times."""

    def __init__(
        self, spec: str, patience: Patience | None = None, opener: Callable[[], Capture] | None = None
    ) -> None:
        self.frames: list[LiveFrame] = []
        self.pictures: list[bytes] = []
        self.states: list[tuple[float, str]] = []
        open_capture = opener or (lambda: Capture(check_source(spec), 1000.0))
        self.loop = CaptureLoop(open_capture, self.frames.append, self.pictures.append, self.tell, patience or QUICK)
        self.loop.start()

    def tell(self, state: str) -> None:
        self.states.append((time.monotonic(), state))

    @property
    def names(self) -> list[str]:
        return [state for _, state in self.states]

    def told_at(self, state: str) -> float:
        return next(at for at, name in reversed(self.states) if name == state)


@pytest.fixture
def record() -> Iterator[Callable[..., Recorder]]:
    made: list[Recorder] = []

    def make(*arguments: object, **options: object) -> Recorder:
        made.append(Recorder(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for recorder in made:
        recorder.loop.close()


BUSY = "lavfi:testsrc=size=80x60:rate=50"


def test_frames_are_numbered_over_all_parts(
    record: Callable[..., Recorder], tmp_path: Path, write_clip: Callable[..., Path], wait_until: Callable[..., float]
) -> None:
    path = write_clip(tmp_path / "clip.mkv", [np.full((48, 64, 3), level, np.uint8) for level in (0, 80, 160)])
    recorder = record(str(path))
    wait_until(lambda: len(recorder.frames) >= 10)
    assert [frame.number for frame in recorder.frames[:10]] == list(range(1, 11))
    assert [frame.part for frame in recorder.frames[:10]] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_killed_process_is_replaced(record: Callable[..., Recorder], wait_until: Callable[..., float]) -> None:
    recorder = record(BUSY)
    wait_until(lambda: len(recorder.frames) >= 5)
    first = recorder.loop.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: recorder.loop.restarts == 1 and recorder.loop.pid not in (None, first))
    count = len(recorder.frames)
    wait_until(lambda: len(recorder.frames) > count)
    assert recorder.loop.last_error == ""
    assert recorder.frames[-1].part > recorder.frames[0].part


def test_process_that_hangs_is_told_within_two_seconds_and_replaced(
    record: Callable[..., Recorder], wait_until: Callable[..., float]
) -> None:
    recorder = record(BUSY)
    wait_until(lambda: "ok" in recorder.names)
    first = recorder.loop.pid
    assert first is not None
    stopped = time.monotonic()
    os.kill(first, signal.SIGSTOP)
    wait_until(lambda: "no signal" in recorder.names)
    assert recorder.told_at("no signal") - stopped < 2.0
    wait_until(lambda: recorder.names[-1] == "ok")
    assert recorder.names == ["ok", "no signal", "ok"]
    assert recorder.loop.pid != first
    assert recorder.loop.restarts == 1


def test_blocked_open_is_told_within_two_seconds_and_tried_again(
    record: Callable[..., Recorder], tmp_path: Path, wait_until: Callable[..., float]
) -> None:
    os.mkfifo(tmp_path / "fifo.mkv")
    began = time.monotonic()
    recorder = record(str(tmp_path / "fifo.mkv"), Patience(first_frame=1.0, first_pause=0.05))
    wait_until(lambda: "no signal" in recorder.names)
    assert recorder.told_at("no signal") - began < 2.0
    wait_until(lambda: recorder.loop.restarts >= 2)
    assert "no frame" in recorder.loop.last_error


def test_server_that_accepts_and_stays_silent_is_told_and_tried_again(
    record: Callable[..., Recorder], wait_until: Callable[..., float]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        began = time.monotonic()
        recorder = record(
            f"rtsp://user:secret@127.0.0.1:{server.getsockname()[1]}/main", Patience(first_frame=1.5, first_pause=0.05)
        )
        wait_until(lambda: "no signal" in recorder.names)
        assert recorder.told_at("no signal") - began < 2.0
        wait_until(lambda: recorder.loop.restarts >= 1 and len(connections) >= 2)
        assert recorder.loop.last_error
        assert "secret" not in recorder.loop.last_error
        recorder.loop.close()
        server.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


def test_frozen_picture_is_told_within_two_seconds_and_the_source_is_opened_again(
    record: Callable[..., Recorder], wait_until: Callable[..., float]
) -> None:
    # Moves for a second, then the last picture stays: opening it again makes it move.
    recorder = record(
        "lavfi:testsrc=size=80x60:rate=30:duration=1,tpad=stop=-1:stop_mode=clone",
        Patience(frozen=3.0, first_pause=0.05),
    )
    wait_until(lambda: "ok" in recorder.names)
    began = recorder.told_at("ok")
    wait_until(lambda: "frozen" in recorder.names)
    assert recorder.told_at("frozen") - began < 1.2 + 2.0
    wait_until(lambda: recorder.names[-1] == "ok")
    assert recorder.names == ["ok", "frozen", "ok"]
    assert recorder.loop.restarts == 1


@pytest.mark.parametrize("colour", ["black", "blue"])
def test_picture_that_turns_to_one_colour_is_no_signal_within_two_seconds(
    colour: str, record: Callable[..., Recorder], wait_until: Callable[..., float]
) -> None:
    recorder = record(f"lavfi:testsrc=size=80x60:rate=30,fade=out:start_time=1:duration=0.1:color={colour}")
    wait_until(lambda: "ok" in recorder.names)
    began = recorder.told_at("ok")
    wait_until(lambda: "no signal" in recorder.names)
    assert recorder.told_at("no signal") - began < 1.2 + 2.0
    assert recorder.loop.restarts == 0


class FakeCapture:
    """A capture that delivers messages and then ends, without a process."""

    pid = 1

    def __init__(self, messages: list[CapturedFrame | Picture]) -> None:
        self.messages, self.watched, self.ended = list(messages), list[bool](), False

    def read(self) -> CapturedFrame | Picture:
        if not self.messages:
            raise LiveSourceError("the source has ended")
        return self.messages.pop(0)

    def watch(self, watched: bool) -> None:
        self.watched.append(watched)

    def kill(self) -> None:
        self.messages.clear()

    def end(self) -> None:
        self.ended = True


def frame(skipped: int = 0) -> CapturedFrame:
    return CapturedFrame(np.zeros((2, 2), np.uint8), time.monotonic(), 1, skipped, ())


def test_pauses_grow_until_the_longest(record: Callable[..., Recorder], wait_until: Callable[..., float]) -> None:
    opened: list[float] = []

    def opener() -> FakeCapture:
        opened.append(time.monotonic())
        return FakeCapture([])

    record("", Patience(first_pause=0.05, longest_pause=0.2), opener)
    wait_until(lambda: len(opened) >= 6)
    pauses = np.diff(opened[:6])
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.2, 0.2], abs=0.045)


def test_pause_is_the_first_one_again_after_a_steady_run(
    record: Callable[..., Recorder], wait_until: Callable[..., float]
) -> None:
    opened: list[float] = []

    def opener() -> FakeCapture:
        opened.append(time.monotonic())
        return FakeCapture([])

    record("", Patience(first_pause=0.05, longest_pause=10.0, steady=0.0), opener)
    wait_until(lambda: len(opened) >= 6)
    assert np.diff(opened[:6]).max() < 0.15


def test_counts_add_up_over_processes_and_pictures_are_asked_for_again(
    record: Callable[..., Recorder], wait_until: Callable[..., float]
) -> None:
    made: list[FakeCapture] = []

    def opener() -> FakeCapture:
        made.append(FakeCapture([frame(3), frame(5), Picture(b"jpeg")]))
        return made[-1]

    recorder = record("", Patience(first_pause=0.2, longest_pause=0.2), opener)
    recorder.loop.watch(True)
    wait_until(lambda: recorder.loop.restarts == 2)
    assert (recorder.loop.captured, recorder.loop.skipped) in {(4, 10), (6, 15)}
    assert recorder.pictures[:2] == [b"jpeg", b"jpeg"]
    assert made[1].watched == [True]
    assert made[0].ended


def test_faults_do_not_end_the_loop(
    record: Callable[..., Recorder], wait_until: Callable[..., float], caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def opener() -> FakeCapture:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ConfigError("a reader process cannot be started")
        if calls == 2:
            raise RuntimeError("Jane Doe")
        return FakeCapture([frame()])

    recorder = record("", QUICK, opener)
    wait_until(lambda: recorder.loop.captured > 0)
    assert "RuntimeError" in caplog.text
    assert "Jane" not in caplog.text


def test_listener_that_fails_does_not_end_the_watch(wait_until: Callable[..., float]) -> None:
    told: list[str] = []

    def tell(state: str) -> None:
        told.append(state)
        raise RuntimeError

    loop = CaptureLoop(lambda: Capture(check_source(BUSY), 1000.0), lambda _: None, lambda _: None, tell, QUICK)
    loop.start()
    wait_until(lambda: told == ["ok"])
    loop.close()
    assert told == ["ok", "stopped"]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def live_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("echoquad-live")]


def test_restarts_leave_nothing_behind(record: Callable[..., Recorder], wait_until: Callable[..., float]) -> None:
    before = descriptors()
    recorder = record(BUSY, Patience(first_pause=0.0, longest_pause=0.0, first_frame=60.0))
    killed: set[int] = set()
    while len(killed) < 10:
        frames = recorder.loop.captured
        wait_until(lambda: recorder.loop.captured > frames, 60)  # noqa: B023
        if (pid := recorder.loop.pid) is not None and pid not in killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
    recorder.loop.close()
    assert recorder.loop.restarts in (9, 10)
    assert descriptors() == before
    assert live_threads() == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in killed)


@pytest.mark.slow
def test_thousand_restarts_leave_nothing_behind(
    wait_until: Callable[..., float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Run the loop with a process that sends one frame of 800x600 pixels and ends, without decoders to start."""
    header = {"frame": [600, 800], "captured": 1.0, "part": 1, "skipped": 0, "flags": []}
    monkeypatch.setattr(
        "echoquad_serve.live.capture._PROGRAM",
        f"import sys, os; sys.stdin.readline(); os.write(1, {json.dumps(header).encode()!r} + b'\\n');"
        "sys.stdout.buffer.write(bytes(480_000)); sys.stdout.flush(); os.abort()",
    )
    before = descriptors()
    loop = CaptureLoop(
        lambda: Capture(check_source(BUSY), 1000.0),
        lambda _: None,
        lambda _: None,
        lambda _: None,
        Patience(first_pause=0.0, longest_pause=0.0),
    )
    loop.start()
    memory: list[float] = []
    for count in (200, 1000):
        wait_until(lambda: loop.restarts >= count, 150)  # noqa: B023
        caplog.clear()
        memory.append(resident_mb())
    loop.close()
    assert loop.captured >= 1000
    assert descriptors() == before
    assert live_threads() == []
    assert memory[1] - memory[0] < 10


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.2, 0.6])
def test_close_at_any_moment_leaves_nothing_behind(moment: float, record: Callable[..., Recorder]) -> None:
    before = descriptors()
    recorder = record(BUSY)
    threading.Event().wait(moment)
    began = time.monotonic()
    recorder.loop.close()
    assert time.monotonic() - began < 3
    assert descriptors() == before
    assert live_threads() == []
    assert recorder.loop.pid is None
    recorder.loop.close()
    assert recorder.names[-1:] in ([], ["stopped"])
