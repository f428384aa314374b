"""The ways from frame files to a CSV that `peers.py` compares, each as a competent engineer would write it by hand.

    python benchmarks/peer_ways.py NAME RUN BUNDLE THREADS

is a process that prepares one of them, says so by ``""``, or why it cannot, and then makes one pass each time that it
is told to: a line of JSON in, ``[folder of frames, CSV file]``, a line out, ``[wall seconds, CPU seconds]``.

All cut a frame where the contract says, and vote by majority; how they read, resize, infer and write is their own.
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
READY = ""  # what a process says that has prepared its way; any other text is why it cannot
BATCH = 8  # frames at a time, where a way has batches


class UnavailableError(Exception):
    """A way cannot be gone on this machine."""


@dataclass(frozen=True)
class Setting:
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
class Way:
    """A peer: its title, the precision that it computes in, and what prepares it."""

    title: str
    precision: str
    prepare: Callable[[Setting], Pass]
    needs: str = ""  # a package that is not EchoQuad's own


# ---------------------------------------------------------------------------------------------- by hand: the ends


def cut(path: Path, contract: Contract) -> list[Image.Image]:
    """Open a frame, as grey, and cut it into its four quadrants."""
    with Image.open(path) as image:
        grey = image.convert("L")
    return [grey.crop(box) for box in quadrant_boxes(*grey.size, contract.keep)]


def cut_small(path: Path, contract: Contract) -> np.ndarray:
    """Give the quadrants resized, uint8 [4, 1, S, S]."""
    size = (contract.input_size, contract.input_size)
    quadrants = [np.asarray(one.resize(size, Image.Resampling.BILINEAR)) for one in cut(path, contract)]
    return np.stack(quadrants)[:, None]


def write(out: Path, contract: Contract, answers: Iterable[tuple[Path, np.ndarray]]) -> None:
    """Vote and write a row a frame; its probabilities are float [4, C]."""
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
    """Map in threads, in order, with no more than `ahead` items under way."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Out]] = deque()
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---------------------------------------------------------------------------------------------- torch


def trained(setting: Setting) -> Any:
    """Give the trained network as one knows it: float32 [N, 3, S, S], normalised, to logits."""
    import torch

    from echoquad_train.runs.checkpoint import load_run

    torch.set_num_threads(setting.threads)
    model = load_run(setting.run).model
    return torch.nn.Sequential(model.backbone, model.head).eval()


def document(setting: Setting) -> Pass:
    """Prepare the document's way: a patch at a time through torchvision's transforms and eager torch."""
    import torch
    from torchvision import transforms

    model, contract = trained(setting), setting.contract
    transform = transforms.Compose(
        [
            transforms.Resize((contract.input_size, contract.input_size)),
            transforms.Grayscale(3),
            transforms.ToTensor(),
            transforms.Normalize([contract.mean] * 3, [contract.std] * 3),
        ]
    )

    def judge(path: Path) -> tuple[Path, np.ndarray]:
        rows = []
        with torch.no_grad():
            for quadrant in cut(path, contract):
                logits = model(transform(quadrant).unsqueeze(0))
                rows.append(torch.softmax(logits / contract.temperature, dim=1)[0].numpy())
        return path, np.stack(rows)

    return lambda paths, out: write(out, contract, map(judge, paths))


def torch_batched(setting: Setting, *, bfloat16: bool = False) -> Pass:
    """Prepare torch at its best: batches, channels last, inference mode, frames read ahead in a thread."""
    import torch

    kind = torch.bfloat16 if bfloat16 else torch.float32
    contract = setting.contract
    model = trained(setting).to(memory_format=torch.channels_last, dtype=kind)

    @torch.inference_mode()
    def judge(quadrants: np.ndarray) -> np.ndarray:
        x = (torch.from_numpy(quadrants).to(kind) / 255 - contract.mean) / contract.std
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        return torch.softmax(model(x).float() / contract.temperature, dim=1).numpy()

    def answers(paths: Sequence[Path]) -> Iterator[tuple[Path, np.ndarray]]:
        # One thread reads ahead; the others are torch's own.
        quadrants = in_threads(lambda path: cut_small(path, contract), paths, 1)
        for begin in range(0, len(paths), BATCH):
            chunk = paths[begin : begin + BATCH]
            found = judge(np.concatenate([next(quadrants) for _ in chunk]))
            yield from zip(chunk, found.reshape(len(chunk), 4, -1), strict=True)

    return lambda paths, out: write(out, contract, answers(paths))


# ---------------------------------------------------------------------------------------------- onnxruntime


def float_graph(setting: Setting) -> bytes:
    """Export the trained network as its author would: one frame, float32 [4, 3, S, S], normalised, to logits."""
    import logging
    import warnings

    import torch

    size = setting.contract.input_size
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            trained(setting),
            (torch.zeros(4, 3, size, size),),
            dynamo=True,
            verbose=False,
            input_names=["input"],
            output_names=["logits"],
        )
    return program.model_proto.SerializeToString()


def ort_session(graph: bytes, threads: int) -> Any:
    onnxruntime = load_onnxruntime()  # as everybody's, but that it tells nobody
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def normalise(quadrants: np.ndarray, contract: Contract) -> np.ndarray:
    """Give float32 [N, 3, S, S] for grey levels, uint8 [N, 1, S, S]."""
    x = (quadrants.astype(np.float32) / 255 - contract.mean) / contract.std
    return np.repeat(x.astype(np.float32), 3, axis=1)


def ort_float(setting: Setting, *, pool: bool = False) -> Pass:
    """Prepare onnxruntime on the author's own float32 graph; with `pool`, frames in threads, a session thread each."""
    contract = setting.contract
    session = ort_session(float_graph(setting), 1 if pool else setting.threads)

    def judge(path: Path) -> tuple[Path, np.ndarray]:
        (logits,) = session.run(None, {"input": normalise(cut_small(path, contract), contract)})
        return path, softmax(logits, contract)

    return _ort_pass(judge, setting, pool)


def ort_graph(setting: Setting, *, precision: str, pool: bool = False) -> Pass:
    """Prepare onnxruntime on the bundle's own graph, which takes grey levels."""
    contract = setting.contract
    session = ort_session(setting.bundle.read_model(precision), 1 if pool else setting.threads)

    def judge(path: Path) -> tuple[Path, np.ndarray]:
        return path, session.run(["probabilities"], {"quadrants": cut_small(path, contract)})[0]

    return _ort_pass(judge, setting, pool)


def _ort_pass(judge: Callable[[Path], tuple[Path, np.ndarray]], setting: Setting, pool: bool) -> Pass:
    if not pool:
        return lambda paths, out: write(out, setting.contract, map(judge, paths))
    return lambda paths, out: write(out, setting.contract, in_threads(judge, paths, setting.threads))


# ---------------------------------------------------------------------------------------------- OpenVINO


def openvino(setting: Setting, *, graph: str, hint: str = "f32", queue: bool = False) -> Pass:
    """Prepare OpenVINO: for latency in a plain loop, or for throughput with frames read in threads and a queue.

    `graph` is a precision of the bundle, or ``int8 plain``: quantised with the first convolution as it was trained, as
    other tools leave it.
    """
    import openvino as ov
    from engines import plain_int8

    contract, core = setting.contract, ov.Core()
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError("this processor has no bfloat16")
    model = core.read_model(plain_int8(setting.bundle) if graph == "int8 plain" else setting.bundle.read_model(graph))
    model.reshape([4, 1, contract.input_size, contract.input_size])
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": setting.threads,
        "PERFORMANCE_HINT": "THROUGHPUT" if queue else "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", settings)
    if not queue:
        request = compiled.create_infer_request()

        def judge(path: Path) -> tuple[Path, np.ndarray]:
            return path, request.infer([cut_small(path, contract)])["probabilities"].copy()

        return lambda paths, out: write(out, contract, map(judge, paths))

    requests = ov.AsyncInferQueue(compiled)

    def many(paths: Sequence[Path], out: Path) -> None:
        found: list[Any] = [None] * len(paths)

        def keep(request: Any, index: int) -> None:
            found[index] = request.get_tensor("probabilities").data.copy()

        requests.set_callback(keep)
        quadrants = in_threads(lambda path: cut_small(path, contract), paths, setting.threads)
        for index, one in enumerate(quadrants):
            requests.start_async([one], index)
        requests.wait_all()
        write(out, contract, zip(paths, found, strict=True))

    return many


# ---------------------------------------------------------------------------------------------- EchoQuad


def echoquad(setting: Setting, *, precision: str) -> Pass:
    """Prepare what ``echoquad predict --out`` does once its process is there."""
    from echoquad_runtime.frames.frame_file import Failure, FrameFile
    from echoquad_runtime.predict.predictor import Predictor
    from echoquad_runtime.results.result_file import ResultFile

    predictor = Predictor(
        setting.bundle, device="cpu", precision=precision, threads=setting.threads, method="majority", many=True
    )

    made_by = {
        "bundle": setting.bundle.manifest["manifest_sha256"],
        "method": predictor.method,
        "device": predictor.engine.device,
        "precision": predictor.engine.precision,
        "shard": None,
    }

    def many(paths: Sequence[Path], out: Path) -> None:
        with ResultFile(out) as rows:
            rows.begin(predictor.contract.classes, made_by)
            for result in predictor.predict(FrameFile(path, path.name) for path in paths):
                if isinstance(result, Failure):
                    raise SystemExit(f"{result.file}: {result.error}")
                rows.write(result)
            rows.finish()

    return many


def echoquad_process(setting: Setting, *, precision: str) -> Pass:
    """Prepare nothing: each pass is a whole ``echoquad predict``."""

    def many(paths: Sequence[Path], out: Path) -> None:
        line = ["predict", setting.bundle_folder, paths[0].parent, "--out", out, "--precision", precision]
        line += ["--threads", setting.threads, "--device", "cpu", "--method", "majority", "--untuned"]
        command = [sys.executable, "-m", "echoquad", *map(str, line)]
        subprocess.run(command, check=True, stderr=subprocess.PIPE)

    return many


def _openvino_ways() -> dict[str, Way]:
    found = {}
    for graph, hint, precision in (("fp32", "f32", "fp32"), ("fp32", "bf16", "bf16"), ("int8 plain", "f32", "int8")):
        for queue in (False, True):

            def prepare(setting: Setting, graph: str = graph, hint: str = hint, queue: bool = queue) -> Pass:
                return openvino(setting, graph=graph, hint=hint, queue=queue)

            title = f"OpenVINO by hand, {precision}, {'threads and queue' if queue else 'plain loop'}"
            found[f"openvino-{precision}{'-queue' * queue}"] = Way(title, precision, prepare, "openvino")
    return found


def _own_ways() -> dict[str, Way]:
    found = {}
    for precision in ("fp32", "int8"):
        found[f"echoquad-{precision}"] = Way(
            f"EchoQuad, {precision}", precision, lambda setting, p=precision: echoquad(setting, precision=p)
        )
        found[f"echoquad-{precision}-process"] = Way(
            f"EchoQuad, {precision}, start of the process included",
            precision,
            lambda setting, p=precision: echoquad_process(setting, precision=p),
        )
    return found


WAYS: dict[str, Way] = {
    "document": Way("document's way: torchvision, torch eager, patch by patch", "fp32", document, "torchvision"),
    "torch": Way("torch, batches, channels last", "fp32", torch_batched, "torch"),
    "torch-bf16": Way(
        "torch, batches, channels last, bf16", "bf16", lambda setting: torch_batched(setting, bfloat16=True), "torch"
    ),
    "ort-fp32": Way("onnxruntime by hand, fp32, plain loop", "fp32", ort_float, "torch"),
    "ort-fp32-threads": Way(
        "onnxruntime by hand, fp32, threads", "fp32", lambda setting: ort_float(setting, pool=True), "torch"
    ),
    "ort-int8": Way(
        "onnxruntime by hand, int8 of the bundle, plain loop",
        "int8",
        lambda setting: ort_graph(setting, precision="int8"),
    ),
    "ort-int8-threads": Way(
        "onnxruntime by hand, int8 of the bundle, threads",
        "int8",
        lambda setting: ort_graph(setting, precision="int8", pool=True),
    ),
    **_openvino_ways(),
    **_own_ways(),
}


def serve(name: str, setting: Setting) -> None:
    """Prepare a way, then make passes until the end of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    try:
        make_pass = WAYS[name].prepare(setting)
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
    serve(sys.argv[1], Setting(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
