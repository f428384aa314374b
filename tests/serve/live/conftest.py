"""Fixtures for the tests of the live view: waiting for a condition, and clips."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., float]:
    """Return a function that waits for a condition and returns the seconds that it took; it fails if it is late."""

    def wait(condition: Callable[[], Any], timeout: float = 60.0) -> float:
        began, pause = time.monotonic(), threading.Event()
        while not condition():
            assert time.monotonic() - began < timeout, "the condition did not come true"
            pause.wait(0.01)
        return time.monotonic() - began

    return wait


@pytest.fixture(scope="session")
def write_clip() -> Callable[..., Path]:
    """Return a function that writes frames, uint8 [H, W, 3], as a clip."""
    av = pytest.importorskip("av")

    def write(
        path: Path,
        frames: Sequence[np.ndarray],
        codec: str = "ffv1",
        pixels: str = "yuv420p",
        *,
        rate: int = 30,
        bit_rate: int | None = None,
        options: dict[str, str] | None = None,
        full_range: bool = False,
    ) -> Path:
        with av.open(str(path), "w") as out:
            track = out.add_stream(codec, rate=rate, options=options or {})
            track.height, track.width = frames[0].shape[:2]
            track.pix_fmt = pixels
            if bit_rate:
                track.bit_rate = bit_rate
            if full_range:
                track.codec_context.color_range = 2
            for number, levels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(levels, "rgb24")
                frame.pts = number
                out.mux(track.encode(frame))
            out.mux(track.encode())
        return path

    return write
