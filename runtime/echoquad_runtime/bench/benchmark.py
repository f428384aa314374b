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
from echoquad_runtime.bench.latency_plot import count_latencies
from echoquad_runtime.bench.live_source import pace
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.onnxruntime_loader import installed_wheels
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.errors import ConfigError, FrameError, GateError, InputNotFoundError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.formats import MATRIX_EXTENSIONS
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.image import read_bytes
from echoquad_runtime.frames.quality_flags import quality_flags
from echoquad_runtime.frames.reader import decode_checked, decode_frame, load_grey
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.quadrants import Grey, frame_quadrants
from echoquad_runtime.voting import aggregate_votes

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
_WARM_UP: Final = 5  # frames
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
        Frames that went through the network at a time in the throughput part; the latency part is one at a time.
    threads
        CPU threads that computed at most.
    spinning
        Whether they wait for their part of an inference in a busy loop.
    frames
        Frames timed in each part.
    stages
        Median milliseconds a frame by stage, one frame at a time.
    latency_ms
        p50, p95, p99 and max, one frame at a time: file bytes to decision, and with `fps` from the moment the frame was
        due, waiting for the one before it included.
    frames_per_second
        File bytes to decisions, as many frames at once as the threads can take.
    load_ms
        Reading, hashing and loading the bundle, and a first run to warm it.
    first_frame_ms
        The first frame after loading, with whatever is done only once.
    peak_rss_mb
        The process's largest resident memory in megabytes (10^6 bytes).
    versions
        What the figures depend on.
    note
        Why another device does not run; empty where there is nothing to say.
    fps
        Frames a second of the live source; None where each frame came as soon as the one before was decided.
    missed_deadlines
        Frames decided after the next one was due; None without `fps`.
    cpu_cores, idle_cpu_percent
        Cores kept busy over the live run, and per cent of one core kept busy while waiting for a frame; None
        without `fps`, the latter also where there was no wait.
    latencies_ms
        Each frame's, in order.
    """

    device: str
    precision: str
    batch_size: int
    threads: int
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
    fps: float | None
    missed_deadlines: int | None
    cpu_cores: float | None
    idle_cpu_percent: float | None
    latencies_ms: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as JSON values; ``histogram`` has the latencies, counted, in place of each of them."""
        values = asdict(self)
        found = count_latencies(values.pop("latencies_ms"))
        return {**values, "histogram": {**asdict(found), "counts": list(found.counts)}}

    def check_p99(self, bound_ms: float) -> None:
        """Hold the 99th percentile of the latencies against a bound.

        Raises
        ------
        GateError
            If it is above.
        """
        found = self.latency_ms["p99"]
        if found > bound_ms:
            raise GateError(
                f"the p99 latency is {found:.2f} ms over {self.frames} frames on {self.device} in {self.precision}; "
                f"expected at most {bound_ms:g} ms; run echoquad tune, or export a smaller or int8 model"
            )


def encoded_golden_frames(bundle: Bundle) -> list[Encoded]:
    """Encode as PNG the golden frames that look like frames, for a machine that has none at hand."""
    golden = bundle.read_golden()
    found = []
    for name, frame in zip(golden.names, golden.frames, strict=True):
        if name.startswith(_LIKE_FRAMES):
            found.append((name, _as_png(frame)))
    return found


def read_encoded(inputs: Sequence[str | Path], limit: int) -> tuple[list[Encoded], list[Failure]]:
    """Read the bytes of up to `limit` frames that decode, and what failed among those tried.

    Frames of clips, and matrices that are text, are no files of their own: they are decoded, and timed as grey PNG.

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
            frames.append((found.name, _encoded(found)))
        except FrameError as error:
            failures.append(Failure(found.name, error))
        if len(frames) == limit:
            break
    if not frames:
        first = f"; the first: {failures[0].file}: {failures[0].error}" if failures else ""
        raise InputNotFoundError(f"no frame can be read for the benchmark{first}")
    return frames, failures


def _encoded(file: FrameFile) -> bytes:
    if file.frame is None and file.path.suffix.lower() not in MATRIX_EXTENSIONS:
        data = read_bytes(file.path)
        decode_frame(data)
        return data
    return _as_png(load_grey(file))


def _as_png(frame: Grey) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "PNG")
    return stream.getvalue()


def run_benchmark(
    folder: str | Path,
    frames: Sequence[Encoded] | None = None,
    *,
    device: Device = "auto",
    precision: str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    spinning: bool = True,
    cuda_graphs: bool = False,
    nhwc: bool = False,
    public_key: str | Path | None = None,
    count: int = 100,
    fps: float | None = None,
) -> Benchmark:
    """Measure latency frame by frame, then throughput, on encoded frames in memory, through a `Predictor`.

    The disk is left out: what a frame costs once its bytes are there is what the processor decides.

    Parameters
    ----------
    folder
        The bundle.
    frames
        Names and file bytes, gone through again and again; None is the bundle's golden frames.
    device, precision, threads, spinning, batch_size, cuda_graphs, nhwc
        As `Predictor`.
    public_key
        As `Bundle`.
    count
        Frames to time in each part.
    fps
        Let the frames of the latency part come at so many a second, as from a live source; None is each as soon as the
        one before is decided.

    Raises
    ------
    BundleError, DeviceUnavailableError
        As `Predictor`.
    ConfigError
        If `fps` is not a number above 0.
    FrameError
        If one of `frames` cannot be judged.
    InputNotFoundError
        If there is no frame to time.
    """
    if fps is not None and not 0 < fps < float("inf"):
        raise ConfigError(f"{fps:g} frames a second found; expected a number above 0")
    begin = time.perf_counter()
    bundle = Bundle(folder, public_key=public_key)
    predictor = Predictor(
        bundle,
        device=device,
        precision=precision,
        threads=threads,
        spinning=spinning,
        batch_size=batch_size,
        cuda_graphs=cuda_graphs,
        nhwc=nhwc,
    )
    load_ms = 1e3 * (time.perf_counter() - begin)
    encoded = [data for _, data in (frames or encoded_golden_frames(bundle))]
    if not encoded:
        raise InputNotFoundError(
            f"{bundle.folder.as_posix()}: its golden frames hold none to time; name frames to time"
        )

    def judge(index: int) -> float:
        begin = time.perf_counter()
        predictor(encoded[index % len(encoded)])
        return time.perf_counter() - begin

    first_frame_ms = 1e3 * judge(0)
    for index in range(_WARM_UP):
        judge(index)
    gc.collect()
    paced = pace(judge, fps, count) if fps else None
    seconds = paced.latencies if paced else [judge(index) for index in range(count)]
    latencies = tuple(1e3 * value for value in seconds)
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
    engine, slots = predictor.engine, predictor.slots(many=False)
    batch = slots.new_batch()
    stages = np.median([time_stages(slots, [encoded[index % len(encoded)]], batch) for index in range(count)], axis=0)
    return Benchmark(
        device=engine.device,
        precision=engine.precision,
        batch_size=predictor.batch_size,
        threads=predictor.threads,
        spinning=spinning,
        frames=count,
        stages=dict(zip(STAGES, (1e3 * stages).tolist(), strict=True)),
        latency_ms={"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": max(latencies)},
        frames_per_second=count / _seconds_for_many(predictor, encoded, count),
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
        fps=fps,
        missed_deadlines=paced.missed if paced else None,
        cpu_cores=paced.cpu_cores if paced else None,
        idle_cpu_percent=100 * paced.idle_cpu if paced and paced.idle_cpu is not None else None,
        latencies_ms=latencies,
    )


def _seconds_for_many(predictor: Predictor, encoded: Sequence[bytes], count: int) -> float:
    """Time `count` frames that are all there, once so many have gone through as make the predictor open for many."""
    began = 0.0
    for many in (predictor.threads + 1, count):
        began = time.perf_counter()
        for result in predictor.predict_encoded((str(index), encoded[index % len(encoded)]) for index in range(many)):
            if isinstance(result, Failure):
                raise result.error
    return time.perf_counter() - began


def time_stages(slots: SlotPool, encoded: Sequence[bytes], batch: Grey) -> list[float]:
    """Judge frames together, file bytes to decisions, as `Predictor` does; return the seconds of each of `STAGES`.

    Parameters
    ----------
    slots
        Run the network.
    encoded
        File bytes, one frame each, as many as `batch` has places or fewer.
    batch
        Where their quadrants go, uint8 [B, 4, 1, S, S], from `SlotPool.new_batch`.
    """
    contract, clock = slots.engine.contract, time.perf_counter
    decoding = quartering = 0.0
    for slot, data in zip(batch, encoded, strict=False):
        begin = clock()
        grey, _ = decode_checked(data)
        decoded = clock()
        frame_quadrants(grey, contract, out=slot)
        quality_flags(slot)
        quartering += clock() - decoded
        decoding += decoded - begin
    begin = clock()
    probabilities = slots.run(batch, len(encoded)).probabilities
    inferred = clock()
    aggregate_votes(probabilities, contract.vote, contract.vote_weights)
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
