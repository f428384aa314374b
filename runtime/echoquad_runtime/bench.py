"""Benchmark: what a bundle costs on this machine, by stage."""

from __future__ import annotations

import contextlib
import gc
import io
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from echoquad_runtime._version import __version__
from echoquad_runtime.bundle import Bundle
from echoquad_runtime.devices import Device, installed_wheels
from echoquad_runtime.errors import FrameError, InputNotFoundError
from echoquad_runtime.frames import decode_frame, read_bytes
from echoquad_runtime.inputs import Failure, find_frames
from echoquad_runtime.quadrants import Grey, frame_quadrants
from echoquad_runtime.session import Engine, OnnxEngine
from echoquad_runtime.vote import decide

__all__ = [
    "STAGES",
    "Benchmark",
    "Encoded",
    "encoded_golden_frames",
    "peak_rss_mb",
    "read_encoded",
    "run_benchmark",
    "time_stages",
]

STAGES: Final = ("decode", "quadrants", "infer", "vote")
_LIKE_FRAMES: Final = (
    "phantom-",
    "validation-",
    "folder-",
)  # names of golden ones; the others are blank, ramps, stripes

Encoded = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What was measured.

    Attributes
    ----------
    device, precision
        What really ran.
    batch_size
        Frames a batch in the throughput part; the latency part is one frame at a time.
    threads
        CPU threads that were asked for; None is what affinity and cgroup allow.
    spinning
        Whether they wait for work in a busy loop.
    frames
        Frames timed in each part.
    stages
        Median milliseconds a frame by stage, one frame at a time.
    latency_ms
        p50, p95, p99 and max, file bytes to decision, one frame at a time.
    frames_per_second
        File bytes to decisions, in batches, one thread of Python.
    load_ms
        Reading, hashing and loading the bundle.
    first_frame_ms
        The first frame after loading, with whatever onnxruntime does only once.
    peak_rss_mb
        The process's largest resident memory in megabytes (10^6 bytes).
    versions
        What the figures depend on.
    note
        Why another device does not run; empty where there is nothing to say.
    """

    device: str
    precision: str
    batch_size: int
    threads: int | None
    spinning: bool
    frames: int
    stages: dict[str, float]
    latency_ms: dict[str, float]
    frames_per_second: float
    load_ms: float
    first_frame_ms: float
    peak_rss_mb: float
    versions: dict[str, str]
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as JSON values."""
        return asdict(self)


def encoded_golden_frames(bundle: Bundle) -> list[Encoded]:
    """Encode as PNG the golden frames that look like frames, for a machine that has none at hand."""
    golden = bundle.read_golden()
    found = []
    for name, frame in zip(golden.names, golden.frames, strict=True):
        if name.startswith(_LIKE_FRAMES):
            stream = io.BytesIO()
            Image.fromarray(frame).save(stream, "PNG")
            found.append((name, stream.getvalue()))
    return found


def read_encoded(inputs: Sequence[str | Path], limit: int) -> tuple[list[Encoded], list[Failure]]:
    """Read the bytes of up to `limit` frames that decode, and what failed among those tried.

    Raises
    ------
    InputNotFoundError
        If none can be read.
    """
    frames: list[Encoded] = []
    failures: list[Failure] = []
    for found in find_frames(inputs):
        if isinstance(found, Failure):
            failures.append(found)
            continue
        try:
            data = read_bytes(found.path)
            decode_frame(data)
            frames.append((found.name, data))
        except FrameError as error:
            failures.append(Failure(found.name, error))
        if len(frames) == limit:
            break
    if not frames:
        first = f"; the first: {failures[0].file}: {failures[0].error}" if failures else ""
        raise InputNotFoundError(f"no frame can be read for the benchmark{first}")
    return frames, failures


def run_benchmark(
    folder: str | Path,
    frames: Sequence[Encoded] | None = None,
    *,
    device: Device = "auto",
    precision: str | None = None,
    batch_size: int = 8,
    threads: int | None = None,
    spinning: bool = True,
    public_key: str | Path | None = None,
    count: int = 100,
) -> Benchmark:
    """Measure latency frame by frame, then throughput in batches, on encoded frames in memory.

    The disk is left out: what a frame costs once its bytes are there is what the processor decides.

    Parameters
    ----------
    folder
        The bundle.
    frames
        Names and file bytes, gone through again and again; None is the bundle's golden frames.
    device, precision, threads, spinning
        As `OnnxEngine`.
    public_key
        As `Bundle`.
    batch_size
        Frames a batch in the throughput part.
    count
        Frames to time in each part.

    Raises
    ------
    BundleError, DeviceUnavailableError
        As `OnnxEngine`.
    InputNotFoundError
        If there is no frame to time.
    """
    begin = time.perf_counter()
    bundle = Bundle(folder, public_key=public_key)
    engine = OnnxEngine(bundle, precision=precision, device=device, threads=threads, spinning=spinning)
    load_ms = 1e3 * (time.perf_counter() - begin)
    encoded = [data for _, data in (frames or encoded_golden_frames(bundle))]
    if not encoded:
        raise InputNotFoundError(
            f"{bundle.folder.as_posix()}: its golden frames hold none to time; name frames to time"
        )
    size = bundle.contract.input_size
    batch = np.empty((batch_size, 4, 1, size, size), np.uint8)

    def frames_from(start: int, many: int = 1) -> list[float]:
        return time_stages(engine, [encoded[index % len(encoded)] for index in range(start, start + many)], batch)

    first_frame_ms = 1e3 * sum(frames_from(0))
    for index in range(5):
        frames_from(index)
    gc.collect()
    times = np.array([frames_from(index) for index in range(count)])
    latency = 1e3 * times.sum(axis=1)
    p50, p95, p99 = np.percentile(latency, [50, 95, 99])

    frames_from(0, batch_size)  # warms this batch's shape
    begin = time.perf_counter()
    for start in range(0, count, batch_size):
        frames_from(start, min(batch_size, count - start))
    elapsed = time.perf_counter() - begin
    return Benchmark(
        device=engine.device,
        precision=engine.precision,
        batch_size=batch_size,
        threads=threads,
        spinning=spinning,
        frames=count,
        stages=dict(zip(STAGES, (1e3 * np.median(times, axis=0)).tolist(), strict=True)),
        latency_ms={"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(latency.max())},
        frames_per_second=count / elapsed,
        load_ms=load_ms,
        first_frame_ms=first_frame_ms,
        peak_rss_mb=peak_rss_mb(),
        versions={
            "echoquad": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": metadata.version("pillow"),
            **installed_wheels(),
            "machine": f"{platform.system()} {platform.machine()}",
        },
        note=engine.note,
    )


def time_stages(engine: Engine, encoded: Sequence[bytes], batch: Grey) -> list[float]:
    """Judge frames together, file bytes to decisions, as `Predictor` does; gives the seconds of each of `STAGES`.

    Parameters
    ----------
    engine
        What judges.
    encoded
        File bytes, one frame each, as many as `batch` has places or fewer.
    batch
        Where their quadrants go, uint8 [B, 4, 1, S, S].
    """
    contract, clock = engine.contract, time.perf_counter
    decoding = quartering = 0.0
    for slot, data in zip(batch, encoded, strict=False):
        begin = clock()
        grey = decode_frame(data)
        decoded = clock()
        frame_quadrants(grey, contract, out=slot)
        quartering += clock() - decoded
        decoding += decoded - begin
    begin = clock()
    _, probabilities = engine.infer(batch[: len(encoded)].reshape(-1, *batch.shape[2:]))
    inferred = clock()
    decide(probabilities.reshape(len(encoded), 4, -1), contract.vote, contract.vote_weights)
    return [decoding, quartering, inferred - begin, clock() - inferred]


def peak_rss_mb() -> float:
    """Give the process's peak resident memory in megabytes (10^6 bytes); NaN where the system does not tell."""
    if sys.platform == "win32":
        return _windows_peak_rss_mb()
    # Linux counts what the parent held before it started this program into ru_maxrss, but not into VmHWM.
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # macOS counts bytes, Linux KiB


def _windows_peak_rss_mb() -> float:
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS of psapi.h."""

        _fields_ = (
            ("cb", wintypes.DWORD),
            ("PageFaultCount", wintypes.DWORD),
            *(
                (name, ctypes.c_size_t)
                for name in ("PeakWorkingSetSize", "WorkingSetSize", "a", "b", "c", "d", "e", "f")
            ),
        )

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    kernel.K32GetProcessMemoryInfo.argtypes = [wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD]
    if not kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        return float("nan")
    return float(counters.PeakWorkingSetSize) / 1e6
