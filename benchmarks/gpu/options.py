"""Options section: options of the CUDA provider, forms of the first convolution, two concurrent slots."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np

from echoquad_runtime.engine.io_binding import FirstRunLock, IoBinding
from gpu.engine import Call, Sample, engine_rows, open_plain_session, slots, time_calls
from gpu.report import NEEDS_CUDA, OUT_OF_TIME, Context

BASELINE = "baseline"
OVERLAP = 0.7  # seconds per measurement of concurrent slots


def provider_options() -> dict[str, dict[str, str]]:
    """Return the compared options of onnxruntime's CUDA provider, by name."""
    nhwc, search = {"prefer_nhwc": "1"}, "cudnn_conv_algo_search"
    sets: dict[str, dict[str, str]] = {BASELINE: {}, "prefer_nhwc": nhwc}
    for choice in ("HEURISTIC", "DEFAULT", "EXHAUSTIVE"):
        sets[f"search {choice}"] = {search: choice}
        sets[f"prefer_nhwc, search {choice}"] = {**nhwc, search: choice}
    for value in ("0", "1"):
        sets[f"max_workspace {value}"] = {"cudnn_conv_use_max_workspace": value}
    sets["fuse_conv_bias"] = {"fuse_conv_bias": "1"}
    sets["prefer_nhwc, fuse_conv_bias"] = {**nhwc, "fuse_conv_bias": "1"}
    sets["prefer_nhwc, fuse_conv_bias, search HEURISTIC"] = {**nhwc, "fuse_conv_bias": "1", search: "HEURISTIC"}
    return sets


def options(context: Context) -> None:
    """Time the bundle's graphs with options of the CUDA provider, with more input channels, and in two slots."""
    sizes = (8, 32, 1) if context.cuda else (1, 2)  # sizes with aims first
    sample = Sample(context, max(sizes))
    bundle, device = context.peer.bundle, context.settings.device
    if not context.cuda:
        context.missing("options of the CUDA provider", NEEDS_CUDA)
    order = [name for name in ("fp16", "fp32", "tf32") if name in bundle.precisions_on(device)]
    overlap(context, sample, order, max(sizes))
    for index, precision in enumerate(order):
        # Half of the time is for the fastest precision.
        part = context.within(1 / (len(order) - index) if index else 0.5)
        compare_options(part, precision, sample, sizes)


def compare_options(context: Context, precision: str, sample: Sample, sizes: Sequence[int]) -> None:
    """Time the graph of a precision in each variant, with one session at a time to save memory."""
    medians: dict[int, dict[str, float]] = {}
    worst: dict[str, float] = {}
    for name, make in variants(context, precision).items():
        if context.left() <= 0:
            context.missing(f"{precision}, {name}", OUT_OF_TIME)
            continue
        try:
            graph, chosen = make()
            session = open_plain_session(context, graph, precision, chosen)
            call = _slot_call(context, session, max(sizes))
        except Exception as error:
            context.missing(f"{precision}, {name}", error)
            continue
        for frames in sizes:
            for median, difference in time_calls(context, {name: call}, sample, frames, precision=precision).values():
                medians.setdefault(frames, {})[name] = median
                worst[name] = max(difference, worst.get(name, 0.0))
        context.table(f"{precision}: milliseconds per batch by provider options", engine_rows(medians, worst))
    allowed = context.peer.bundle.gate(precision)["max_abs_dprobability"]
    for frames, column in sorted(medians.items()):
        context.note(best_options(precision, frames, column, worst, allowed))


def _slot_call(context: Context, session: Any, most: int) -> Call:
    provider, first_runs = session.get_providers()[0], FirstRunLock(session.get_providers()[0])
    slot = IoBinding(
        session,
        context.peer.contract,
        most,
        make_error=lambda _, error: error,
        provider=provider,
        first_runs=first_runs,
    )
    return lambda batch: slot.run(batch, len(batch)).probabilities


def variants(context: Context, precision: str) -> dict[str, Callable[[], tuple[bytes, dict[str, str]]]]:
    """Return the compared variants by name: calls that return a graph and provider options.

    The baseline is repeated at the end, to show the noise within a run.
    """
    model = context.peer.bundle.read_model(precision)
    sets = provider_options() if context.cuda else {BASELINE: {}}
    found: dict[str, Callable[[], tuple[bytes, dict[str, str]]]] = {
        name: partial(lambda chosen: (model, chosen), chosen) for name, chosen in sets.items()
    }
    if find_spec("onnx") is None:
        context.missing(f"{precision}, first convolution with more channels", "onnx is not installed")
    else:
        for channels, nhwc in product((3, 4, 8), (False, True) if context.cuda else (False,)):
            chosen = {"prefer_nhwc": "1"} if nhwc else {}
            found[f"{channels} input channels{', prefer_nhwc' * nhwc}"] = partial(
                lambda channels, chosen: (widened(model, channels), chosen), channels, chosen
            )
    return {**found, f"{BASELINE} again": found[BASELINE]}


def widened(model: bytes, channels: int) -> bytes:
    """Return an equivalent graph whose first convolution reads its input channel `channels` times.

    Tensor cores need channels in multiples of 4 or 8; the benchmark shows whether that pays.

    Raises
    ------
    ValueError
        If the first convolution has not exactly one input channel.
    """
    import onnx

    graph = onnx.load_model_from_string(model)
    nodes = graph.graph.node
    index = next(position for position, node in enumerate(nodes) if node.op_type == "Conv")
    source, name = nodes[index].input[0], nodes[index].input[1]
    tensor = next(one for one in graph.graph.initializer if one.name == name)
    weights = onnx.numpy_helper.to_array(tensor)
    if weights.shape[1] != 1:
        raise ValueError(f"the first convolution has {weights.shape[1]} input channels; expected 1")
    shared = np.repeat(weights / weights.dtype.type(channels), channels, axis=1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(shared, name))
    nodes[index].input[0] = "widened"
    nodes.insert(index, onnx.helper.make_node("Concat", [source] * channels, ["widened"], axis=1))
    return bytes(graph.SerializeToString())


def best_options(
    precision: str, frames: int, medians: Mapping[str, float], worst: Mapping[str, float], allowed: float
) -> str:
    """Return a sentence with the three fastest variants within the gate, relative to the baseline."""
    right = {name: value for name, value in medians.items() if worst[name] <= allowed}
    wrong = [name for name in medians if name not in right]
    under = medians.get(BASELINE)
    ranked = sorted(right, key=lambda name: right[name])[:3]
    words = ", ".join(
        f"{name} {right[name]:.3f} ms{'' if under is None else f' ({right[name] / under:.2f})'}" for name in ranked
    )
    line = f"{precision}, {frames} frame{'s' * (frames > 1)}, fastest first, over the {BASELINE}: {words or 'none'}."
    return f"{line} Wrong answers: {', '.join(wrong)}." if wrong else line


def overlap(context: Context, sample: Sample, precisions: Sequence[str], most: int) -> None:
    """Compare one thread with two that run batches of one engine concurrently, as `predict` does."""
    rows = [["", "frames per batch", "one thread, frames/s", "two threads, frames/s", "ratio"]]
    for precision, frames in product(precisions, sorted({min(8, most), most})):
        if context.left() <= 0:
            context.missing(f"{precision}, two threads, {frames} frames", OUT_OF_TIME)
            continue
        try:
            call = slots(context, frames, precision=precision)
            one, two = (_throughput(call, sample, frames, threads) for threads in (1, 2))
        except Exception as error:
            context.missing(f"{precision}, two threads, {frames} frames", error)
            continue
        context.record(way=f"EchoQuad {precision}", frames=frames, one_thread_fps=one, two_threads_fps=two)
        rows.append([f"EchoQuad {precision}", str(frames), f"{one:.0f}", f"{two:.0f}", f"{two / one:.2f}"])
        context.table("Two concurrent slots", rows)


def _throughput(call: Call, sample: Sample, frames: int, threads: int) -> float:
    """Return frames per second of `threads` threads that run batches for `OVERLAP` seconds."""
    batches = [sample.batch(frames, start)[0] for start in range(threads)]
    ready = threading.Barrier(threads + 1)

    def work(batch: np.ndarray) -> tuple[int, float]:
        try:
            call(batch)  # opens the slot
        except BaseException:
            ready.abort()
            raise
        ready.wait()
        done, end = 0, time.perf_counter() + OVERLAP
        while time.perf_counter() < end:
            call(batch)
            done += frames
        return done, time.perf_counter()

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(work, batch) for batch in batches]
        with contextlib.suppress(threading.BrokenBarrierError):  # the future holds the error
            ready.wait()
        begin = time.perf_counter()
        found = [one.result() for one in running]
    return sum(done for done, _ in found) / (max(end for _, end in found) - begin)
