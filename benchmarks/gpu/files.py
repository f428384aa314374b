"""Sections from files to a CSV: EchoQuad against plain implementations, and scaling with CPU cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from common import FORMATS, FRAME_SIZE, link_tree, rotated
from PIL import Image
from workers.peer import cut_small, in_threads, write

from echoquad_runtime.bundle.onnx_header import INPUT
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices.cpu_info import available_cpus
from echoquad_runtime.devices.execution_providers import CPU_PROVIDER, CUDA_PROVIDER
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
from echoquad_runtime.frames.discovery import walk
from gpu.engine import Call, torch_call
from gpu.report import OUT_OF_TIME, Context, OutOfTimeError, aim, ratio

PLAIN_AIM = 1.5  # times plain onnxruntime with threads
DECODE_AIM = 0.85  # of reading alone
SCALING_AIM = 0.8  # of linear scaling from 2 cores
DISTINCT = 400  # distinct files; further ones are hard links
ROUNDS = 3  # at most, depending on the time; at least one
BATCH = {"cuda": 16, "cpu": 4}  # frames per batch of plain implementations
FRAMES_PER_CORE = 100  # frames per pass and core for the comparison of cores
CORES = (2, 4, 8, 16)
NOISE = 3.0  # grey levels, standard deviation

PNG, JPEG = "rgb-png", "rgb-jpeg"
Pass = Callable[[Sequence[Path]], "float | None"]  # may return the seconds to count
Seconds = dict[tuple[str, str], list[float]]  # per pass, by file format and pipeline


# Frame files


def frame_tree(context: Context, file_format: str, count: int) -> Path:
    """Return a folder of `count` RGB files of 800x600, the given frames with noise; written once."""
    work = context.settings.work
    folder, distinct = work / f"{file_format}-{count}", work / file_format
    if folder.exists():
        return folder
    if not distinct.exists():
        sources = list(walk(context.settings.frames))
        random.Random(0).shuffle(sources)
        made = work / f"{file_format}.part"
        made.mkdir()
        number = min(context.settings.count, DISTINCT)
        jobs = [
            (sources[index % len(sources)], made / f"{index:05}{FORMATS[file_format][1]}", index)
            for index in range(number)
        ]
        with ProcessPoolExecutor(context.settings.threads, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(partial(_make_file, file_format, FRAME_SIZE), jobs, chunksize=8))
        made.rename(distinct)
    links = work / f"{file_format}-{count}.part"
    link_tree(links, sorted(distinct.iterdir()), count)
    links.rename(folder)
    return folder


def _make_file(file_format: str, size: tuple[int, int], job: tuple[Path, Path, int]) -> None:
    source, target, seed = job
    with Image.open(source) as image:
        levels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    noisy = levels + np.random.default_rng(seed).normal(0, NOISE, levels.shape)
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(target, **FORMATS[file_format][2])


# Files to CSV


def files(context: Context) -> None:
    """Time files to CSV: EchoQuad's command, plain onnxruntime and torch, and reading alone."""
    count, threads = context.settings.count, context.settings.threads
    short = 8 * threads + 8  # enough files for the command to read in processes
    if count <= short:
        raise ValueError(f"--count {count} found; expected more than {short} files on {threads} CPUs")
    order = [name for name in (("fp16", "fp32") if context.cuda else ("int8", "fp32")) if _holds(context, name)]
    trees = {file_format: frame_tree(context, file_format, count) for file_format in (PNG, JPEG)}
    short_trees = {file_format: frame_tree(context, file_format, short) for file_format in (PNG, JPEG)}
    passes = _passes(context, order)
    plan = [
        (file_format, name) for name in passes for file_format in ((PNG, JPEG) if _on_jpeg(name, order) else (PNG,))
    ]
    starts: Seconds = {}
    seconds: Seconds = {}
    failed: set[str] = set()
    if not context.cuda:  # the first run fills EchoQuad's cache, which exists for the CPU only
        for name in (name for name in passes if name.startswith("EchoQuad")):
            _clock(passes[name], short_trees[JPEG])
    for turn in range(ROUNDS):
        for file_format, name in rotated(plan, turn):
            if name in failed or (turn and context.left() < 3 * max(seconds.get((file_format, name), [0.0]))):
                continue
            if context.left() <= 0:
                context.missing(f"{name}, {file_format}", OUT_OF_TIME)
                continue
            try:
                if name.startswith("EchoQuad"):
                    starts.setdefault((file_format, name), []).append(_clock(passes[name], short_trees[file_format]))
                taken = _clock(passes[name], trees[file_format])
            except OutOfTimeError:
                context.missing(f"{name}, {file_format}", OUT_OF_TIME)
                continue
            except Exception as error:
                failed.add(name)
                context.missing(name, error)
                continue
            seconds.setdefault((file_format, name), []).append(taken)
            context.record(way=name, files=file_format, frames=count, seconds=taken)
            context.table("Files to CSV", file_rows(rates(seconds, starts, count, short), seconds, count))
    found = rates(seconds, starts, count, short)
    for file_format, name in (key for key in seconds if key[1] not in found[key[0]]):
        context.missing(f"{name}, {file_format}", f"{count} files took no longer than {short}; give a larger --count")
    context.aims(
        [line for file_format in (PNG, JPEG) for line in file_aims(file_format, order[0], found.get(file_format, {}))]
    )
    context.note(
        f"{count} files of 800x600 per pass, {threads} threads, medians of up to {ROUNDS} rounds. EchoQuad is the "
        f"command `predict --out`; its frames/s exclude the start, measured by a run over {short} files, and the "
        "last column includes it. Plain implementations run in a warm process. Reading alone is decoding, cropping "
        "and resizing."
    )


def _holds(context: Context, precision: str) -> bool:
    return precision in context.peer.bundle.precisions_on(context.settings.device)


def _on_jpeg(name: str, order: Sequence[str]) -> bool:
    return name.startswith("reading") or (name.endswith(order[0]) and "workers" not in name)


def _clock(make_pass: Pass, folder: Path) -> float:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    begin = time.perf_counter()
    counted = make_pass(paths)
    return time.perf_counter() - begin if counted is None else counted


def _passes(context: Context, order: Sequence[str]) -> dict[str, Pass]:
    """Return the compared pipelines by name."""
    passes: dict[str, Pass] = {}
    for precision in order:
        passes[f"EchoQuad {precision}"] = partial(predict, context, precision, ())
    passes[f"EchoQuad {order[0]}, --workers 0"] = partial(predict, context, order[0], ("--workers", 0))
    for precision in order:
        try:
            passes[f"plain onnxruntime {precision}"] = plain_pass(context, ort_call(context, precision))
        except Exception as error:
            context.missing(f"plain onnxruntime {precision}", error)
    half = "fp16" if context.cuda else "fp32"
    if find_spec("torch") is None:
        context.missing(f"plain torch {half}", "torch is not installed")
    else:
        try:
            passes[f"plain torch {half}"] = plain_pass(
                context, torch_call(context.peer, context.settings.device, half=context.cuda)
            )
        except Exception as error:
            context.missing(f"plain torch {half}", error)
    passes["reading alone, threads"] = partial(read_in_threads, context)
    passes["reading alone, processes"] = partial(read_in_processes, context)
    return passes


def predict(context: Context, precision: str, more: Sequence[object], paths: Sequence[Path]) -> None:
    """Run ``echoquad predict --out`` on the folder of the paths."""
    out, folder, threads = context.settings.work / "rows.csv", paths[0].parents[1], context.settings.threads
    line = ["-m", "echoquad", "predict", context.settings.bundle, folder, "--out", out, "--untuned"]
    context.checked(*line, "--device", context.settings.device, "--precision", precision, "--threads", threads, *more)
    out.unlink()


def ort_call(context: Context, precision: str) -> Call:
    """Return a call of plain onnxruntime: default options, but without TF32 in fp32."""
    ort = load_onnxruntime()
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 4
    providers: list[Any] = [CPU_PROVIDER]
    if context.cuda:
        ort.preload_dlls()
        providers = [(CUDA_PROVIDER, {"use_tf32": "0"})]
    session = ort.InferenceSession(context.peer.bundle.read_model(precision), session_options, providers=providers)
    if session.get_providers()[0] != (CUDA_PROVIDER if context.cuda else CPU_PROVIDER):
        raise RuntimeError(f"onnxruntime made a session on {session.get_providers()[0]}")

    def call(batch: np.ndarray) -> np.ndarray:
        (found,) = session.run(["probabilities"], {INPUT: batch.reshape(-1, *batch.shape[2:])})
        return np.asarray(found).reshape(len(batch), 4, -1)

    return call


def plain_pass(context: Context, call: Call) -> Pass:
    """Return a pass that reads in all threads and runs batches in the main thread."""
    contract, threads = context.peer.contract, context.settings.threads
    size = BATCH[context.settings.device]
    for frames in {size, context.settings.count % size or size}:  # a first run per shape allocates and chooses kernels
        call(np.zeros((frames, 4, 1, contract.input_size, contract.input_size), np.uint8))

    def cut_all(paths: Sequence[Path]) -> np.ndarray:
        return np.stack([cut_small(path, contract) for path in paths])

    def answers(paths: Sequence[Path]) -> Iterator[tuple[Path, np.ndarray]]:
        parts = [paths[begin : begin + size] for begin in range(0, len(paths), size)]
        for part, batch in zip(parts, in_threads(cut_all, parts, threads, ahead=2 * threads), strict=True):
            yield from zip(part, call(batch), strict=True)

    return lambda paths: write(context.settings.work / "plain.csv", contract, answers(paths))


def read_in_threads(context: Context, paths: Sequence[Path]) -> None:
    """Read and crop files in threads, without inference."""
    with ThreadPoolExecutor(context.settings.threads) as pool:
        for _ in pool.map(partial(_read, context.peer.contract), paths):
            pass


def read_in_processes(context: Context, paths: Sequence[Path]) -> float:
    """Read and crop files in processes; return the seconds without their start."""
    spawn, number = multiprocessing.get_context("spawn"), context.settings.threads
    ready = spawn.Barrier(number + 1)
    with ProcessPoolExecutor(number, spawn, initializer=ready.wait, initargs=(60.0,)) as pool:
        for _ in range(number):  # each starts a process, because none is idle
            pool.submit(int)
        ready.wait(60.0)
        begin = time.perf_counter()
        for _ in pool.map(partial(_read, context.peer.contract), paths, chunksize=4):
            pass
        return time.perf_counter() - begin


def _read(contract: Contract, path: Path) -> None:
    cut_small(path, contract)


def rates(seconds: Seconds, starts: Seconds, count: int, short: int) -> dict[str, dict[str, float]]:
    """Return frames per second by file format and pipeline, without the start of commands.

    A command that took no longer for all files than for a few is omitted.

    Parameters
    ----------
    seconds
        Seconds of the passes over `count` files, by format and pipeline.
    starts
        Seconds of the commands over `short` files.
    """
    found: dict[str, dict[str, float]] = {}
    for (file_format, name), taken in seconds.items():
        column, median, files = found.setdefault(file_format, {}), statistics.median(taken), count
        if (file_format, name) in starts:
            median, files = median - statistics.median(starts[file_format, name]), count - short
        if median > 0:
            column[name] = files / median
    return found


def file_rows(found: Mapping[str, Mapping[str, float]], seconds: Seconds, count: int) -> list[list[str]]:
    """Return table rows: one per pipeline and file format."""
    rows = [["", "files", "frames/s", "passes", "frames/s with start"]]
    for (file_format, name), taken in seconds.items():
        whole = f"{count / statistics.median(taken):.0f}" if name.startswith("EchoQuad") else ""
        rate = f"{found[file_format][name]:.0f}" if name in found[file_format] else ""
        rows.append([name, file_format, rate, str(len(taken)), whole])
    return rows


def file_aims(file_format: str, precision: str, found: Mapping[str, float]) -> list[str]:
    """Compare frames per second of one file format with the aims."""
    own, plain = f"EchoQuad {precision}", f"plain onnxruntime {precision}"
    reading = [value for name, value in found.items() if name.startswith("reading alone")]
    most = {"reading": max(reading)} if reading else {}
    return [
        aim(f"{file_format}, {own} over {plain}", ratio(found, own, plain), PLAIN_AIM, at_most=False),
        aim(
            f"{file_format}, {own} over reading alone",
            ratio({**found, **most}, own, "reading"),
            DECODE_AIM,
            at_most=False,
        ),
    ]


# CPU cores


def scaling(context: Context) -> None:
    """Time files to CSV on the CPU with 2 to 16 cores, in int8 if available."""
    cpus, bundle = min(context.settings.threads, available_cpus()), context.peer.bundle
    precision = "int8" if "int8" in bundle.precisions else bundle.default_precision
    if beyond := [str(number) for number in CORES if number > cpus]:
        context.missing(f"{', '.join(beyond)} cores", f"this process may use {cpus}")
    found: dict[int, float] = {}
    for number in (one for one in CORES if one <= cpus):
        count = min(context.settings.count, FRAMES_PER_CORE * number)
        short = 8 * number + 8
        trees = [frame_tree(context, PNG, size) for size in (short, count)]
        try:
            with limited_to(number):
                # The first run fills EchoQuad's cache and is not counted.
                _, few, many = (_on_cores(context, precision, number, trees[index]) for index in (0, 0, 1))
        except (RuntimeError, OutOfTimeError) as error:
            context.missing(f"{number} cores", OUT_OF_TIME if isinstance(error, OutOfTimeError) else error)
            continue
        found[number] = (count - short) / max(1e-3, many - few)
        context.record(way=f"EchoQuad {precision}, CPU", cores=number, frames=count, fps=found[number])
        context.table(f"Files to CSV on the CPU, {precision}", scaling_rows(found))
    if found:
        context.note(scaling_aim(found))
    context.note(f"{PNG}, one run per row, without start. {_siblings()}")


def _on_cores(context: Context, precision: str, number: int, folder: Path) -> float:
    out = context.settings.work / "rows.csv"
    line = ["-m", "echoquad", "predict", context.settings.bundle, folder, "--out", out, "--untuned"]
    finished = context.checked(*line, "--device", "cpu", "--precision", precision, "--threads", number)
    out.unlink()
    return finished.seconds


@contextlib.contextmanager
def limited_to(number: int) -> Iterator[None]:
    """Pin this process and its children to the first `number` of its CPUs."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(allowed)[:number]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def shares(found: Mapping[int, float]) -> dict[int, float]:
    """Return the share of linear scaling from 2 cores, by cores."""
    return {number: rate / (found[2] * number / 2) for number, rate in found.items()} if 2 in found else {}


def scaling_rows(found: Mapping[int, float]) -> list[list[str]]:
    """Return table rows: frames per second by cores."""
    share = shares(found)
    rows = [["cores", "frames/s", "of linear from 2"]]
    for number, rate in found.items():
        rows.append([str(number), f"{rate:.1f}", f"{share[number]:.2f}" if number in share else ""])
    return rows


def scaling_aim(found: Mapping[int, float]) -> str:
    """Compare the share of linear scaling at the largest number of cores with the aim."""
    most, share = max(found), shares(found)
    value = share.get(most) if most > 2 else None
    return aim(f"{most} cores, share of linear from 2", value, SCALING_AIM, at_most=False)


def _siblings() -> str:
    """Return which CPUs share a core, which affects what linear scaling can mean."""
    path = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    try:
        listed = path.read_text().strip()
    except OSError:
        return "It is unknown which CPUs share a core."
    return f"CPUs {listed} share a core." if "," in listed or "-" in listed else "No two CPUs share a core."
