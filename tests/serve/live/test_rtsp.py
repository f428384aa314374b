"""A camera of a network: a GStreamer RTSP server that streams, dies and comes back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from echoquad_serve.live.capture import Capture, check_source
from echoquad_serve.live.capture_loop import CaptureLoop, Patience
from echoquad_serve.live.newest_frame import LiveFrame

pytest.importorskip("av")

PYTHON = "/usr/bin/python3"  # Debian's, which has GStreamer's bindings
SERVER = Path(__file__).with_name("rtsp_server.py")


def start_server(port: int = 0) -> tuple[subprocess.Popen[bytes], int]:
    process = subprocess.Popen(
        [PYTHON, str(SERVER), str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin"}
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        end_server(process)
        pytest.skip("needs Debian's gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-good and python3-gi")
    return process, int(line)


def end_server(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(10)
    if process.stdout is not None:
        process.stdout.close()


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    if sys.platform == "win32" or not Path(PYTHON).exists():
        pytest.skip("needs Debian's python3-gi")
    process, port = start_server()
    yield process, port
    end_server(process)


def test_camera_that_loses_its_power_is_told_within_two_seconds_and_found_again(
    server: tuple[subprocess.Popen[bytes], int], wait_until: Callable[..., float]
) -> None:
    process, port = server
    frames: list[LiveFrame] = []
    states: list[tuple[float, str]] = []
    source = check_source(f"rtsp://127.0.0.1:{port}/main")
    loop = CaptureLoop(
        lambda: Capture(source, 1000.0),
        frames.append,
        lambda _: None,
        lambda state: states.append((time.monotonic(), state)),
        Patience(longest_pause=0.5),
    )
    loop.start()
    again = None
    try:
        wait_until(lambda: len(frames) >= 60)
        assert frames[0].grey.shape == (240, 320)
        assert np.diff([frame.captured for frame in frames[30:]]).mean() == pytest.approx(1 / 30, rel=0.1)
        died = time.monotonic()
        end_server(process)
        wait_until(lambda: states[-1][1] == "no signal")
        assert states[-1][0] - died < 2.0
        assert loop.last_error
        again, _ = start_server(port)
        count = len(frames)
        wait_until(lambda: len(frames) >= count + 30)
        wait_until(lambda: states[-1][1] == "ok")
    finally:
        loop.close()
        if again is not None:
            end_server(again)
