"""Engine section: EchoQuad against a plain session and torch, with frames in memory."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
from common import alternate
from workers.peer import Setup, trained

from echoquad_runtime.bundle.onnx_header import INPUT
from echoquad_runtime.devices.execution_providers import CPU_PROVIDER, CUDA_PROVIDER, create_session
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import SlotPool, infer_in_batches
from echoquad_runtime.frames.discovery import walk
from echoquad_runtime.frames.reader import read_frame
from echoquad_runtime.quadrants import frame_quadrants
from gpu.report import LARGE, NEEDS_CUDA, OUT_OF_TIME, Context, aim, ratio

ENGINE_AIM = 1.10  # fp16 over torch fp16, channels last, in the same run
GRAPH_AIM = 1.5  # one frame with CUDA graphs over the device time
OWN, GRAPHS, HALF = "EchoQuad fp16", "EchoQuad fp16, CUDA graphs", "torch fp16, channels last"
NHWC, NHWC_GRAPHS = "EchoQuad fp16, NHWC", "EchoQuad fp16, NHWC, CUDA graphs"
DEVICE_TIME = "torch fp16 in a CUDA graph, device time"

# float32 [F, 4, C], the probabilities of frames, uint8 [F, 4, 1, S, S]
Call = Callable[[np.ndarray], np.ndarray]


# Frames and answers


class Sample:
    """Quadrants of the given frames, and the answers of the CPU in the most exact precision of the bundle.

    Attributes
    ----------
    quadrants
        uint8 [F, 4, 1, S, S]; frames repeat if there are too few.
    expected
        Probabilities, float32 [F, 4, C].
    """

    def __init__(self, context: Context, frames: int) -> None:
        bundle = context.peer.bundle
        paths = list(walk(context.settings.frames))
        random.Random(0).shuffle(paths)
        found = [frame_quadrants(read_frame(path), bundle.contract) for path in paths[:frames]]
        self.quadrants = np.stack([found[index % len(found)] for index in range(frames)])
        exact = "fp32" if "fp32" in bundle.precisions else bundle.default_precision
        engine = OnnxEngine(bundle, precision=exact, device="cpu", threads=context.settings.threads)
        _, probabilities = infer_in_batches(engine, self.quadrants, min(8, frames))
        self.expected = probabilities.reshape(frames, 4, -1)

    def batch(self, frames: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return a batch of frames from `start` on, cyclically, and the expected answers."""
        chosen = (np.arange(frames) + start) % len(self.quadrants)
        return self.quadrants[chosen], self.expected[chosen]

    def difference(self, call: Call, frames: int) -> float:
        """Return the largest |difference| of a probability over two different batches; infinite for NaN.

        Two batches reveal an engine that answers for an earlier input.
        """
        largest = 0.0
        for start in (0, 1):
            quadrants, expected = self.batch(frames, start)
            difference = np.abs(call(quadrants).astype(np.float64) - expected)
            largest = max(largest, float(np.nan_to_num(difference, nan=np.inf).max()))
        return largest


def time_calls(
    context: Context, calls: Mapping[str, Call], sample: Sample, frames: int, **facts: str
) -> dict[str, tuple[float, float]]:
    """Time calls interleaved; report and skip those that fail. `facts` go into each record.

    Returns
    -------
    dict
        Median milliseconds and the largest |difference| of a probability, by name.
    """
    differences: dict[str, float] = {}
    for name, call in calls.items():
        if context.left() <= 0:  # the first run of a shape can take a second, while cuDNN tries kernels
            context.missing(f"{' '.join([*facts.values(), name])}, {frames} frames", OUT_OF_TIME)
            continue
        try:
            differences[name] = sample.difference(call, frames)
        except Exception as error:
            context.missing(f"{' '.join([*facts.values(), name])}, {frames} frames", error)
    batch, _ = sample.batch(frames)
    # Without pauses, the GPU keeps the clock that it has under load.
    pause = {"pause": 0.0} if context.cuda else {}
    turns = {name: partial(calls[name], batch) for name in differences}
    rounds = context.settings.rounds if frames < LARGE else -(-context.settings.rounds // 2)
    medians = alternate(turns, rounds, **pause) if turns else {}
    for name, median in medians.items():
        context.record(**facts, way=name, frames=frames, ms=median, max_abs_dp=differences[name])
    return {name: (median, differences[name]) for name, median in medians.items()}


# The engine


def engine(context: Context) -> None:
    """Time EchoQuad, a plain session and torch on 1 to 64 frames."""
    sizes = (1, 8, 32, 2, 64) if context.cuda else (1, 2)  # sizes with aims first
    sample = Sample(context, max(sizes))
    calls = {**own_calls(context, max(sizes)), **bare_calls(context)}
    device_times: dict[int, float] = {}
    if find_spec("torch") is None:
        context.missing("torch", "torch is not installed")
    else:
        calls |= torch_calls(context)
        if context.cuda:
            try:
                device_times = device_time(context.peer, sample, sizes)
            except Exception as error:
                context.missing(DEVICE_TIME, error)
        else:
            context.missing(DEVICE_TIME, NEEDS_CUDA)
    medians: dict[int, dict[str, float]] = {}
    worst: dict[str, float] = {}
    for frames in sizes:
        if context.left() <= 0:
            context.missing(f"{frames} frames", OUT_OF_TIME)
            continue
        found = time_calls(context, calls, sample, frames)
        medians[frames] = {name: median for name, (median, _) in found.items()}
        for name, (_, difference) in found.items():
            worst[name] = max(difference, worst.get(name, 0.0))
        if frames in device_times:
            medians[frames][DEVICE_TIME] = device_times[frames]
            context.record(way=DEVICE_TIME, frames=frames, ms=device_times[frames])
        context.table("Milliseconds per batch", engine_rows(medians, worst))
    context.aims(engine_aims(medians))
    context.note(
        f"Medians of {context.settings.rounds} interleaved rounds, half as many from {LARGE} frames on; input and "
        "answers in host memory; |dp| is the largest difference of a probability from the CPU."
    )


def own_calls(context: Context, most: int) -> dict[str, Call]:
    """Return calls of EchoQuad in each precision and in each variant that `tune` tries on CUDA."""
    bundle, device = context.peer.bundle, context.settings.device
    calls: dict[str, Call] = {}
    if not context.cuda:
        context.missing("NHWC and CUDA graphs", NEEDS_CUDA)
    choices = (False, True) if context.cuda else (False,)
    for precision, nhwc, graphs in product(bundle.precisions_on(device), choices, choices):
        name = f"EchoQuad {precision}{', NHWC' * nhwc}{', CUDA graphs' * graphs}"
        try:
            calls[name] = slots(context, most, precision=precision, cuda_graphs=graphs, nhwc=nhwc)
        except Exception as error:
            context.missing(name, error)
    return calls


def slots(context: Context, most: int, **options: Any) -> Call:
    """Return a call that runs EchoQuad's slots on up to `most` frames; `options` are those of `OnnxEngine`."""
    opened = OnnxEngine(
        context.peer.bundle, device=context.settings.device, threads=context.settings.threads, **options
    )
    pool = SlotPool(opened, most)
    return lambda batch: pool.run(batch, len(batch)).probabilities


def bare_calls(context: Context) -> dict[str, Call]:
    """Return calls of ``session.run`` on the bundle's graphs."""
    calls: dict[str, Call] = {}
    for precision in context.peer.bundle.precisions_on(context.settings.device):
        try:
            session = open_plain_session(context, context.peer.bundle.read_model(precision), precision)
        except Exception as error:
            context.missing(f"session.run {precision}", error)
            continue

        def call(batch: np.ndarray, session: Any = session) -> np.ndarray:
            (found,) = session.run(["probabilities"], {INPUT: batch.reshape(-1, *batch.shape[2:])})
            return np.asarray(found).reshape(len(batch), 4, -1)

        calls[f"session.run {precision}"] = call
    return calls


def open_plain_session(context: Context, model: bytes, precision: str, chosen: Mapping[str, str] | None = None) -> Any:
    """Open a session on the device with the given options of the CUDA provider."""
    provider = CUDA_PROVIDER if context.cuda else CPU_PROVIDER
    options = {"use_tf32": str(int(precision == "tf32")), **(chosen or {})}
    return create_session(load_onnxruntime(), model, provider, threads=context.settings.threads, cuda_options=options)


def torch_calls(context: Context) -> dict[str, Call]:
    """Return calls of the trained network in torch: float32, TF32, and float16 with channels last."""
    wanted: dict[str, dict[str, Any]] = {"torch fp32": {}}
    if context.cuda:
        wanted |= {"torch tf32": {"tf32": True}, HALF: {"half": True}}
    else:
        context.missing("torch tf32; torch fp16, channels last", NEEDS_CUDA)
    calls: dict[str, Call] = {}
    for name, options in wanted.items():
        try:
            calls[name] = torch_call(context.peer, context.settings.device, **options)
        except Exception as error:
            context.missing(name, error)
    return calls


def torch_call(setup: Setup, device: str, *, tf32: bool = False, half: bool = False) -> Call:
    """Return a call of the trained network in torch, with normalisation on the device."""
    import torch

    contract = setup.contract
    where, dtype = torch.device(device), torch.float16 if half else torch.float32
    layout = torch.channels_last if half else torch.contiguous_format
    model = trained(setup).to(where, dtype, memory_format=layout)
    scale, offset = 1 / (255 * contract.std), contract.mean / contract.std

    @torch.inference_mode()
    def call(batch: np.ndarray) -> np.ndarray:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        quadrants = torch.from_numpy(batch.reshape(-1, *batch.shape[2:]))
        x = quadrants.to(where).to(dtype).mul_(scale).sub_(offset).expand(-1, 3, -1, -1)
        found = torch.softmax(model(x.contiguous(memory_format=layout)).float() / contract.temperature, 1)
        return found.cpu().numpy().reshape(len(batch), 4, -1)

    return call


def device_time(setup: Setup, sample: Sample, sizes: Sequence[int]) -> dict[int, float]:
    """Return milliseconds of torch fp16, channels last, in a CUDA graph, between two device events."""
    import torch

    contract, where = setup.contract, torch.device("cuda")
    model = trained(setup).to(where, torch.float16, memory_format=torch.channels_last)
    found = {}
    with torch.inference_mode():
        for frames in sizes:
            batch, _ = sample.batch(frames)
            x = (torch.from_numpy(batch.reshape(-1, *batch.shape[2:])).float() / 255 - contract.mean) / contract.std
            x = x.expand(-1, 3, -1, -1).to(where, torch.float16).contiguous(memory_format=torch.channels_last)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # cuDNN chooses kernels before the capture
                    model(x)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(x)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            times = []
            for _ in range(50):
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end))
            found[frames] = statistics.median(times)
    return found


def engine_rows(medians: Mapping[int, Mapping[str, float]], worst: Mapping[str, float]) -> list[list[str]]:
    """Return table rows: a row per engine, a column per number of frames."""
    columns = [medians[frames] for frames in sorted(medians)]
    rows = [["", *(f"{frames} frame{'s' * (frames > 1)}" for frames in sorted(medians)), "|dp|"]]
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [f"{column[name]:.3f}" if name in column else "" for column in columns]
        rows.append([name, *cells, f"{worst[name]:.1e}" if name in worst else ""])
    return rows


def engine_aims(medians: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Compare the engine with its aims."""
    lines = []
    for frames in (8, 32):
        for own in (OWN, NHWC, GRAPHS, NHWC_GRAPHS):
            value = ratio(medians.get(frames, {}), own, HALF)
            lines.append(aim(f"{frames} frames, {own} over {HALF}", value, ENGINE_AIM, at_most=True))
    for own in (GRAPHS, NHWC_GRAPHS):
        value = ratio(medians.get(1, {}), own, DEVICE_TIME)
        lines.append(aim(f"1 frame, {own} over {DEVICE_TIME}", value, GRAPH_AIM, at_most=True))
    return lines
