"""What one frame's four quadrants cost in each engine, alternating in one run, on the same weights.

    python benchmarks/engines.py RUN BUNDLE [--rounds 60] [--threads 2] [--results benchmarks/RESULTS.md]

Every precision that the bundle holds is timed in EchoQuad and, where `openvino` is installed, in OpenVINO on the same
graph; int8 there also with the first convolution left as it was trained, since the stem that suits onnxruntime does not
suit OpenVINO. Prints a table, then one JSON line. Decoding is left out; `echoquad bench` has it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import alternate, arguments, report

from echoquad_export.calibrate import Ranges
from echoquad_export.quantize import float_tensors, prepare, quantize
from echoquad_runtime.bundle import Bundle
from echoquad_runtime.quadrants import frame_quadrants
from echoquad_runtime.session import INPUT, OnnxEngine
from echoquad_train.checkpoint import load_run
from echoquad_train.networks.engine import TorchEngine

Quadrants = np.ndarray


def main() -> None:
    options = arguments(__doc__, run=True, frames=False, rounds=60).parse_args()

    bundle = Bundle(options.bundle)
    size = bundle.contract.input_size
    quadrants = np.random.default_rng(0).integers(0, 256, (4, 1, size, size), np.uint8)
    calls: dict[str, Callable[[], object]] = torch_calls(options.run, quadrants, options.threads)
    for precision in bundle.precisions:
        engine = OnnxEngine(bundle, precision=precision, device="cpu", threads=options.threads)
        calls[f"EchoQuad, {precision}"] = lambda engine=engine: engine.infer(quadrants)  # type: ignore[misc]
    calls |= openvino_calls(bundle, quadrants, options.threads)

    medians = alternate(calls, options.rounds)
    single = medians.get("EchoQuad, fp32", next(iter(medians.values())))
    rows = [["engine", "ms a frame", "of EchoQuad, fp32"]]
    rows += [[name, f"{median:.2f}", f"{median / single:.2f}"] for name, median in medians.items()]
    record = {"input_size": size, "rounds": options.rounds, "median_ms": medians}
    report("engines", rows, record, options.results, threads=options.threads)


def torch_calls(run: Path, quadrants: Quadrants, threads: int) -> dict[str, Callable[[], object]]:
    torch.set_num_threads(threads)
    loaded = load_run(run)
    eager = TorchEngine(loaded.model, loaded.contract)

    def one_by_one() -> None:
        for quadrant in quadrants:
            eager.infer(quadrant[None])

    return {
        "torch eager, quadrant by quadrant": one_by_one,
        "torch eager, batch of 4": lambda: eager.infer(quadrants),
    }


def openvino_calls(bundle: Bundle, quadrants: Quadrants, threads: int) -> dict[str, Callable[[], object]]:
    try:
        import openvino
    except ImportError:
        return {}
    core = openvino.Core()
    graphs = {name: (bundle.read_model(name), "f32") for name in bundle.precisions if name != "fp16"}
    if "fp32" in graphs:
        if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            graphs["bf16"] = (graphs["fp32"][0], "bf16")
        if "int8" in graphs:
            graphs["int8, first convolution as trained"] = (plain_int8(bundle), "f32")

    def call(graph: bytes, precision: str) -> Callable[[], object]:
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        request = core.compile_model(core.read_model(graph), "CPU", settings).create_infer_request()
        return lambda: request.infer({INPUT: quadrants})

    return {f"OpenVINO, {name}": call(*graph) for name, graph in graphs.items()}


def plain_int8(bundle: Bundle) -> bytes:
    """Quantise the bundle's float32 graph with the first convolution as it was trained, on its golden frames: ranges cost no time."""
    model = prepare(bundle.read_model("fp32"), bundle.contract, space_to_depth=False)
    frames = np.stack([frame_quadrants(frame, bundle.contract)[:, 0] for frame in bundle.read_golden().frames])
    return quantize(model, Ranges(model, frames, float_tensors(model)))


if __name__ == "__main__":
    main()
