"""Benchmark: latency by stage, throughput, load time and memory of a bundle on this host."""

from __future__ import annotations

import gc
import io
import platform
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
from echoquad_runtime.bench.live_source import run_live
from echoquad_runtime.bench.peak_memory import peak_rss_mb
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.onnxruntime_loader import installed_wheels
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.errors import ConfigError, FrameError, GateError, InputNotFoundError
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.file_access import read_bytes
from echoquad_runtime.frames.formats import MATRIX_EXTENSIONS
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.frames.quality_flags import quality_flags
from echoquad_runtime.frames.reader import decode_grey, decode_grey_and_flags, load_grey
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.quadrants import Grey, frame_quadrants
from echoquad_runtime.voting import aggregate_votes

__all__ = [
    "STAGES",
    "Benchmark",
    "Encoded",
    "encoded_golden_frames",
    "read_encoded",
    "run_benchmark",
    "time_pool",
    "time_stages",
]

STAGES: Final = ("decode", "quadrants", "infer", "vote")
_WARM_UP: Final = 5  # frames
# Prefixes of golden frames that look like frames; the others are blank, ramps or stripes.
_FRAME_PREFIXES: Final = ("phantom-", "validation-", "folder-")

Encoded = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The figures of a benchmark.

    Attributes
    ----------
    device, precision
        The device and precision in use.
    batch_size
        Frames per batch in the throughput part; the latency part has one frame at a time.
    threads
        Maximum number of computing CPU threads.
    spinning
        Whether idle threads wait in a busy loop during an inference.
    frames
        Number of frames timed in each part.
    stages
        Median milliseconds per frame by stage, one frame at a time.
    latency_ms
        Latency percentiles p50, p95, p99 and max, one frame at a time, from file bytes to decision. With `fps` a
        latency starts when the frame is due, so it includes waiting for the previous frame.
    frames_per_second
        Throughput from file bytes to decisions, with as many concurrent frames as the threads can take.
    load_ms
        Time to read, hash and load the bundle, and of a first run to warm up.
    first_frame_ms
        Latency of the first frame after loading, with all one-time work.
    peak_rss_mb
        Peak resident memory of the process in megabytes (10^6 bytes).
    versions
        Versions that the figures depend on.
    note
        Why another device is not used; empty if there is nothing to say.
    fps
        Frames per second of the live source; None if each frame starts as soon as the previous one is decided.
    missed_deadlines
        Frames decided after the next one was due; None without `fps`.
    cpu_cores, idle_cpu_percent
        Average number of busy cores during the live run, and percent of one core that is busy while it waits for a
        frame; None without `fps`, the latter also if there was no wait.
    latencies_ms
        Latency of each frame, in order.
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
        """Return the figures as JSON values; ``histogram``, the counts by latency, replaces the single latencies."""
        values = asdict(self)
        histogram = count_latencies(values.pop("latencies_ms"))
        return {**values, "histogram": {**asdict(histogram), "counts": list(histogram.counts)}}

    def check_p99(self, bound_ms: float) -> None:
        """Check the 99th percentile of the latencies against an upper bound.

        Raises
        ------
        GateError
            If it is larger.
        """
        p99 = self.latency_ms["p99"]
        if p99 > bound_ms:
            raise GateError(
                f"the p99 latency is {p99:.2f} ms over {self.frames} frames on {self.device} in {self.precision}; "
                f"expected at most {bound_ms:g} ms; run echoquad tune, or export a smaller or int8 model"
            )


def encoded_golden_frames(bundle: Bundle) -> list[Encoded]:
    """Return the golden frames that look like frames as PNG files, for a host without frames of its own."""
    golden = bundle.read_golden()
    return [
        (name, _as_png(frame))
        for name, frame in zip(golden.names, golden.frames, strict=True)
        if name.startswith(_FRAME_PREFIXES)
    ]


def read_encoded(inputs: Sequence[str | Path], limit: int) -> tuple[list[Encoded], list[Failure]]:
    """Return the file bytes of up to `limit` frames that decode, and the failures among those tried.

    Frames of a video and matrices in text form are decoded first and timed as grey PNG.

    Raises
    ------
    InputNotFoundError
        If no frame can be read.
    """
    frames: list[Encoded] = []
    failures: list[Failure] = []
    for item in find_frames(inputs):
        if isinstance(item, Failure):
            failures.append(item)
            continue
        try:
            frames.append((item.name, _encoded(item)))
        except FrameError as error:
            failures.append(Failure(item.name, error))
        if len(frames) == limit:
            break
    if not frames:
        first = f"; the first: {failures[0].file}: {failures[0].error}" if failures else ""
        raise InputNotFoundError(f"no frame can be read for the benchmark{first}")
    return frames, failures


def _encoded(file: FrameFile) -> bytes:
    if file.frame is None and file.path.suffix.lower() not in MATRIX_EXTENSIONS:
        data = read_bytes(file.path)
        decode_grey(data)
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
    """Measure the latency of single frames, then throughput, with a `Predictor` on encoded frames in memory.

    Reading from disk is not timed.

    Parameters
    ----------
    folder
        The bundle.
    frames
        Names and file bytes, used repeatedly; None uses the bundle's golden frames.
    device, precision, threads, spinning, batch_size, cuda_graphs, nhwc
        As `Predictor`.
    public_key
        As `Bundle`.
    count
        Number of frames to time in each part.
    fps
        Frames per second of a live source in the latency part; None starts each frame as soon as the previous one is
        decided.

    Raises
    ------
    BundleError, DeviceUnavailableError
        As `Predictor`.
    ConfigError
        If `fps` is not a number above 0.
    FrameError
        If one of `frames` cannot be predicted.
    InputNotFoundError
        If there is no frame to time.
    """
    if fps is not None and not 0 < fps < float("inf"):
        raise ConfigError(f"fps is {fps:g}; expected a number above 0")
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
        raise InputNotFoundError(f"{bundle.folder.as_posix()}: no golden frame can be timed; name frames to time")

    def predict_one(index: int) -> float:
        begin = time.perf_counter()
        predictor(encoded[index % len(encoded)])
        return time.perf_counter() - begin

    first_frame_ms = 1e3 * predict_one(0)
    for index in range(_WARM_UP):
        predict_one(index)
    gc.collect()
    live = run_live(predict_one, fps, count) if fps else None
    seconds = live.latencies if live else [predict_one(index) for index in range(count)]
    latencies = tuple(1e3 * value for value in seconds)
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
    engine, slots = predictor.engine, predictor.slots(concurrent=False)
    batch = slots.new_batch()
    repeated = [encoded[index % len(encoded)] for index in range(max(count, predictor.threads + 1))]
    stages = np.median([time_stages(slots, [data], batch) for data in repeated[:count]], axis=0)
    time_pool(predictor, repeated[: predictor.threads + 1])  # opens the session for concurrent frames, untimed
    return Benchmark(
        device=engine.device,
        precision=engine.precision,
        batch_size=predictor.batch_size,
        threads=predictor.threads,
        spinning=spinning,
        frames=count,
        stages=dict(zip(STAGES, (1e3 * stages).tolist(), strict=True)),
        latency_ms={"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": max(latencies)},
        frames_per_second=count / time_pool(predictor, repeated[:count]),
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
        missed_deadlines=live.missed if live else None,
        cpu_cores=live.cpu_cores if live else None,
        idle_cpu_percent=100 * live.idle_cpu if live and live.idle_cpu is not None else None,
        latencies_ms=latencies,
    )


def time_pool(predictor: Predictor, encoded: Sequence[bytes]) -> float:
    """Predict frames as those of a folder are, from file bytes to decisions; return the seconds."""
    begin = time.perf_counter()
    for result in predictor.predict_encoded((str(index), data) for index, data in enumerate(encoded)):
        if isinstance(result, Failure):
            raise result.error
    return time.perf_counter() - begin


def time_stages(slots: SlotPool, encoded: Sequence[bytes], batch: Grey) -> list[float]:
    """Predict frames in one batch, from file bytes to decisions, as `Predictor` does; return the seconds by stage.

    Parameters
    ----------
    slots
        Run the network.
    encoded
        File bytes of up to B frames.
    batch
        Memory for their quadrants, uint8 [B, 4, 1, S, S], from `SlotPool.new_batch`.

    Returns
    -------
    list of float
        One number for each of `STAGES`.
    """
    contract, clock = slots.engine.contract, time.perf_counter
    decoding = cutting = 0.0
    for slot, data in zip(batch, encoded, strict=False):
        begin = clock()
        grey, _ = decode_grey_and_flags(data)
        decoded = clock()
        frame_quadrants(grey, contract, out=slot)
        quality_flags(slot, grey)
        cutting += clock() - decoded
        decoding += decoded - begin
    begin = clock()
    probabilities = slots.run(batch, len(encoded)).probabilities
    inferred = clock()
    aggregate_votes(probabilities, contract.vote, contract.vote_weights)
    return [decoding, cutting, inferred - begin, clock() - inferred]
