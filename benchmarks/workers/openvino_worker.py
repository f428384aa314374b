"""Run OpenVINO for `engines.py` in another environment, because its wheel and onnxruntime's exclude each other.

    PYTHON benchmarks/workers/openvino_worker.py BUNDLE GRAPHS THREADS

PYTHON needs onnxruntime-openvino, openvino, numpy and Pillow. GRAPHS is a folder of further ONNX files, NAME.onnx. The
first line of output is JSON: the available calls, and versions. Each line of input names a call; the worker makes it on
the quadrants of one frame and answers with an empty line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "runtime"))

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import BF16
from echoquad_runtime.bundle.onnx_header import INPUT
from echoquad_runtime.devices.openvino_probe import openvino_unavailable_reason
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import SlotPool


def main(folder: str, graphs: str, threads: int) -> None:
    import openvino

    bundle = Bundle(folder)
    size = bundle.contract.input_size
    quadrants = np.random.default_rng(0).integers(0, 256, (4, 1, size, size), np.uint8)
    core = openvino.Core()

    def plain_call(graph: bytes, precision: str) -> Callable[[], object]:
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        request = core.compile_model(core.read_model(graph), "CPU", settings).create_infer_request()
        return lambda: request.infer({INPUT: quadrants})

    names = [name for name in bundle.precisions if name != "fp16"]
    if "fp32" in names and openvino_unavailable_reason(bfloat16=True) is None:
        names.append(BF16)
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        slots = SlotPool(OnnxEngine(bundle, precision=name, device="openvino", threads=threads), 1)
        calls[f"EchoQuad, {name}, device openvino"] = lambda slots=slots: slots.run(quadrants[None], 1)  # type: ignore[misc]
        calls[f"OpenVINO, {name}"] = plain_call(bundle.read_model(name), "bf16" if name == BF16 else "f32")
    for path in sorted(Path(graphs).glob("*.onnx")):
        calls[f"OpenVINO, {path.stem}"] = plain_call(path.read_bytes(), "f32")
    versions = {name: metadata.version(name) for name in ("onnxruntime-openvino", "openvino")}
    print(json.dumps({"calls": list(calls), "versions": versions}), flush=True)
    for line in sys.stdin:
        calls[line.rstrip("\n")]()
        print(flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
