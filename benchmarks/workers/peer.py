"""Pipelines from frame files to a CSV that `peers.py` compares: EchoQuad, and others as an engineer would write them.

    python -m workers.peer NAME RUN BUNDLE THREADS

prepares a pipeline and prints ``""``, or the reason why it is unavailable, as JSON. Then each line of input,
``[folder of frames, CSV file]``, runs one pass, and the answer is ``[wall seconds, CPU seconds]``.

All pipelines crop by the contract and vote by majority; reading, resizing, inference and writing differ.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
from echoquad_runtime.quadrants import quadrant_boxes

Pass = Callable[[Sequence[Path], Path], None]
In, Out = TypeVar("In"), TypeVar("Out")
READY = ""  # answer of a prepared pipeline; any other text is why it is unavailable
BATCH = 8  # frames per batch, in pipelines with batches


class UnavailableError(Exception):
    """A pipeline is not available on this machine."""


@dataclass(frozen=True)
class Setup:
    """Run, bundle and CPU threads of a pipeline."""

    run: Path
    bundle_folder: Path
    threads: int

    @cached_property
    def bundle(self) -> Bundle:
        return Bundle(self.bundle_folder)

    @property
    def contract(self) -> Contract:
        return self.bundle.contract


@dataclass(frozen=True)
class Pipeline:
    """A pipeline: its title, precision, the function that prepares it, and the package that it needs."""

    title: str
    precision: str
    prepare: Callable[[Setup], Pass]
    needs: str = ""


# Reading and writing


def cut(path: Path, contract: Contract) -> list[Image.Image]:
    """Read a frame as grey levels and return its four quadrants."""
    with Image.open(path) as image:
        grey = image.convert("L")
    return [grey.crop(box) for box in quadrant_boxes(*grey.size, contract.keep, contract.quadrants)]


def cut_small(path: Path, contract: Contract) -> np.ndarray:
    """Return the resized quadrants, uint8 [4, 1, S, S]."""
    size = (contract.input_size, contract.input_size)
    quadrants = [np.asarray(one.resize(size, Image.Resampling.BILINEAR)) for one in cut(path, contract)]
    return np.stack(quadrants)[:, None]


def write(out: Path, contract: Contract, answers: Iterable[tuple[Path, np.ndarray]]) -> None:
    """Vote and write one row per frame; `answers` are paths with probabilities, float [4, C]."""
    classes = contract.classes
    header = ["file", "method", "pred_image", *(f"prob_{name}" for name in classes)]
    for quadrant in QUADRANTS:
        header += [f"pred_{quadrant}", *(f"p_{quadrant}_{name}" for name in classes)]
    with out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for path, probabilities in answers:
            labels, mean = probabilities.argmax(axis=1), probabilities.mean(axis=0)
            votes = np.bincount(labels, minlength=len(classes))
            winner = max(range(len(classes)), key=lambda index: (votes[index], mean[index]))
            row = [path.name, "majority", classes[winner], *(f"{value:.4f}" for value in mean)]
            for label, values in zip(labels, probabilities, strict=True):
                row += [classes[label], *(f"{value:.4f}" for value in values)]
            writer.writerow(row)


def softmax(logits: np.ndarray, contract: Contract) -> np.ndarray:
    scaled = logits / contract.temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def in_threads(call: Callable[[In], Out], items: Iterable[In], threads: int, ahead: int = 16) -> Iterator[Out]:
    """Map in threads, in order, with at most `ahead` items in flight."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Out]] = deque()
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# torch


def trained(setup: Setup) -> Any:
    """Return the trained network in torch, from normalised float32 [N, 3, S, S] to logits."""
    import torch

    from echoquad_train.runs.checkpoint import load_run

    torch.set_num_threads(setup.threads)
    model = load_run(setup.run).model
    return torch.nn.Sequential(model.backbone, model.head).eval()


def reference(setup: Setup) -> Pass:
    """Prepare the reference pipeline: quadrant by quadrant through torchvision transforms and eager torch."""
    import torch
    from torchvision import transforms

    model, contract = trained(setup), setup.contract
    transform = transforms.Compose(
        [
            transforms.Resize((contract.input_size, contract.input_size)),
            transforms.Grayscale(3),
            transforms.ToTensor(),
            transforms.Normalize([contract.mean] * 3, [contract.std] * 3),
        ]
    )

    def infer(path: Path) -> tuple[Path, np.ndarray]:
        rows = []
        with torch.no_grad():
            for quadrant in cut(path, contract):
                logits = model(transform(quadrant).unsqueeze(0))
                rows.append(torch.softmax(logits / contract.temperature, dim=1)[0].numpy())
        return path, np.stack(rows)

    return lambda paths, out: write(out, contract, map(infer, paths))


def torch_batched(setup: Setup, *, bfloat16: bool = False) -> Pass:
    """Prepare optimised torch: batches, channels last, inference mode, frames read ahead in a thread."""
    import torch

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    contract = setup.contract
    model = trained(setup).to(memory_format=torch.channels_last, dtype=dtype)

    @torch.inference_mode()
    def infer(quadrants: np.ndarray) -> np.ndarray:
        x = (torch.from_numpy(quadrants).to(dtype) / 255 - contract.mean) / contract.std
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        return torch.softmax(model(x).float() / contract.temperature, dim=1).numpy()

    def answers(paths: Sequence[Path]) -> Iterator[tuple[Path, np.ndarray]]:
        # One thread reads ahead; torch uses the others.
        quadrants = in_threads(lambda path: cut_small(path, contract), paths, 1)
        for begin in range(0, len(paths), BATCH):
            chunk = paths[begin : begin + BATCH]
            found = infer(np.concatenate([next(quadrants) for _ in chunk]))
            yield from zip(chunk, found.reshape(len(chunk), 4, -1), strict=True)

    return lambda paths, out: write(out, contract, answers(paths))


# onnxruntime


def float_graph(setup: Setup) -> bytes:
    """Export the trained network in the usual way: one frame, normalised float32 [4, 3, S, S], to logits."""
    import logging
    import warnings

    import torch

    size = setup.contract.input_size
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            trained(setup),
            (torch.zeros(4, 3, size, size),),
            dynamo=True,
            verbose=False,
            input_names=["input"],
            output_names=["logits"],
        )
    return program.model_proto.SerializeToString()


def ort_session(graph: bytes, threads: int) -> Any:
    onnxruntime = load_onnxruntime()  # with telemetry off
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def normalise(quadrants: np.ndarray, contract: Contract) -> np.ndarray:
    """Return float32 [N, 3, S, S] from grey levels uint8 [N, 1, S, S]."""
    x = (quadrants.astype(np.float32) / 255 - contract.mean) / contract.std
    return np.repeat(x.astype(np.float32), 3, axis=1)


def ort_float(setup: Setup, *, pool: bool = False) -> Pass:
    """Prepare onnxruntime on `float_graph`; with `pool`, one thread per frame and one session thread each."""
    contract = setup.contract
    session = ort_session(float_graph(setup), 1 if pool else setup.threads)

    def infer(path: Path) -> tuple[Path, np.ndarray]:
        (logits,) = session.run(None, {"input": normalise(cut_small(path, contract), contract)})
        return path, softmax(logits, contract)

    return _ort_pass(infer, setup, pool)


def ort_graph(setup: Setup, *, precision: str, pool: bool = False) -> Pass:
    """Prepare onnxruntime on the bundle's graph, which reads grey levels."""
    contract = setup.contract
    session = ort_session(setup.bundle.read_model(precision), 1 if pool else setup.threads)

    def infer(path: Path) -> tuple[Path, np.ndarray]:
        return path, session.run(["probabilities"], {"quadrants": cut_small(path, contract)})[0]

    return _ort_pass(infer, setup, pool)


def _ort_pass(infer: Callable[[Path], tuple[Path, np.ndarray]], setup: Setup, pool: bool) -> Pass:
    if not pool:
        return lambda paths, out: write(out, setup.contract, map(infer, paths))
    return lambda paths, out: write(out, setup.contract, in_threads(infer, paths, setup.threads))


# OpenVINO


def openvino(setup: Setup, *, graph: str, hint: str = "f32", queue: bool = False) -> Pass:
    """Prepare OpenVINO: a plain loop with the latency hint, or threads and a queue with the throughput hint.

    `graph` is a precision of the bundle, or ``int8 plain``: quantized with the first convolution as trained.
    """
    import openvino as ov
    from engines import plain_int8

    contract, core = setup.contract, ov.Core()
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError("this processor has no bfloat16")
    model = core.read_model(plain_int8(setup.bundle) if graph == "int8 plain" else setup.bundle.read_model(graph))
    model.reshape([4, 1, contract.input_size, contract.input_size])
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": setup.threads,
        "PERFORMANCE_HINT": "THROUGHPUT" if queue else "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", options)
    if not queue:
        request = compiled.create_infer_request()

        def infer(path: Path) -> tuple[Path, np.ndarray]:
            return path, request.infer([cut_small(path, contract)])["probabilities"].copy()

        return lambda paths, out: write(out, contract, map(infer, paths))

    requests = ov.AsyncInferQueue(compiled)

    def make_pass(paths: Sequence[Path], out: Path) -> None:
        found: list[Any] = [None] * len(paths)

        def keep(request: Any, index: int) -> None:
            found[index] = request.get_tensor("probabilities").data.copy()

        requests.set_callback(keep)
        quadrants = in_threads(lambda path: cut_small(path, contract), paths, setup.threads)
        for index, one in enumerate(quadrants):
            requests.start_async([one], index)
        requests.wait_all()
        write(out, contract, zip(paths, found, strict=True))

    return make_pass


# EchoQuad


def echoquad(setup: Setup, *, precision: str) -> Pass:
    """Prepare what ``echoquad predict --out`` does after its start."""
    from echoquad_runtime.frames.frame_file import Failure, FrameFile
    from echoquad_runtime.predict.predictor import Predictor
    from echoquad_runtime.results.result_file import ResultFile

    predictor = Predictor(
        setup.bundle, device="cpu", precision=precision, threads=setup.threads, method="majority", concurrent=True
    )

    made_by = {
        "bundle": setup.bundle.manifest["manifest_sha256"],
        "method": predictor.method,
        "device": predictor.engine.device,
        "precision": predictor.engine.precision,
        "shard": None,
    }

    def make_pass(paths: Sequence[Path], out: Path) -> None:
        with ResultFile(out) as rows:
            rows.begin(predictor.contract.classes, made_by)
            for result in predictor.predict(FrameFile(path, path.name) for path in paths):
                if isinstance(result, Failure):
                    raise SystemExit(f"{result.file}: {result.error}")
                rows.write(result)
            rows.finish()

    return make_pass


def echoquad_process(setup: Setup, *, precision: str) -> Pass:
    """Run a whole ``echoquad predict`` process for each pass."""

    def make_pass(paths: Sequence[Path], out: Path) -> None:
        line = ["predict", setup.bundle_folder, paths[0].parent, "--out", out, "--precision", precision]
        line += ["--threads", setup.threads, "--device", "cpu", "--method", "majority", "--untuned"]
        command = [sys.executable, "-m", "echoquad", *map(str, line)]
        subprocess.run(command, check=True, stderr=subprocess.PIPE)

    return make_pass


def _openvino_pipelines() -> dict[str, Pipeline]:
    found = {}
    for graph, hint, precision in (("fp32", "f32", "fp32"), ("fp32", "bf16", "bf16"), ("int8 plain", "f32", "int8")):
        for queue in (False, True):

            def prepare(setup: Setup, graph: str = graph, hint: str = hint, queue: bool = queue) -> Pass:
                return openvino(setup, graph=graph, hint=hint, queue=queue)

            title = f"plain OpenVINO, {precision}, {'threads and queue' if queue else 'loop'}"
            found[f"openvino-{precision}{'-queue' * queue}"] = Pipeline(title, precision, prepare, "openvino")
    return found


def _echoquad_pipelines() -> dict[str, Pipeline]:
    found = {}
    for precision in ("fp32", "int8"):
        found[f"echoquad-{precision}"] = Pipeline(
            f"EchoQuad, {precision}", precision, lambda setup, p=precision: echoquad(setup, precision=p)
        )
        found[f"echoquad-{precision}-process"] = Pipeline(
            f"EchoQuad, {precision}, process start included",
            precision,
            lambda setup, p=precision: echoquad_process(setup, precision=p),
        )
    return found


PIPELINES: dict[str, Pipeline] = {
    "reference": Pipeline(
        "reference pipeline: torchvision, torch eager, quadrant by quadrant", "fp32", reference, "torchvision"
    ),
    "torch": Pipeline("torch, batches, channels last", "fp32", torch_batched, "torch"),
    "torch-bf16": Pipeline(
        "torch, batches, channels last, bf16", "bf16", lambda setup: torch_batched(setup, bfloat16=True), "torch"
    ),
    "ort-fp32": Pipeline("plain onnxruntime, fp32, loop", "fp32", ort_float, "torch"),
    "ort-fp32-threads": Pipeline(
        "plain onnxruntime, fp32, threads", "fp32", lambda setup: ort_float(setup, pool=True), "torch"
    ),
    "ort-int8": Pipeline(
        "plain onnxruntime, int8 of the bundle, loop",
        "int8",
        lambda setup: ort_graph(setup, precision="int8"),
    ),
    "ort-int8-threads": Pipeline(
        "plain onnxruntime, int8 of the bundle, threads",
        "int8",
        lambda setup: ort_graph(setup, precision="int8", pool=True),
    ),
    **_openvino_pipelines(),
    **_echoquad_pipelines(),
}


def serve(name: str, setup: Setup) -> None:
    """Prepare a pipeline, then run passes until the end of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print to stdout; answers go to a copy of it
    try:
        make_pass = PIPELINES[name].prepare(setup)
    except UnavailableError as error:
        print(json.dumps(str(error)), file=answers, flush=True)
        return
    print(json.dumps(READY), file=answers, flush=True)
    for line in sys.stdin:
        folder, out = map(Path, json.loads(line))
        paths = sorted(folder.iterdir())
        begin, cpu = time.perf_counter(), time.process_time()
        make_pass(paths, out)
        print(json.dumps([time.perf_counter() - begin, time.process_time() - cpu]), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Setup(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
