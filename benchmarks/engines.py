"""Time inference of one frame (four quadrants) in several engines on the same weights, interleaved.

    python benchmarks/engines.py RUN BUNDLE [--rounds 60] [--threads 2] [--untimed 1]
        [--openvino-python PYTHON] [--results benchmarks/RESULTS.md]

EchoQuad runs each precision of the bundle on the CPU. With `--openvino-python`, the Python of an environment with
onnxruntime-openvino and openvino, it also runs on the device openvino, and is compared with plain OpenVINO on the same
graph; for int8 also on a graph that keeps the first convolution as trained. The timed frame follows `--untimed` frames
after a pause: 1 for frames that come one by one, 10 for a folder, in which threads stay awake. Prints a table, then one
line of JSON. Decoding is not included; see `echoquad bench`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import arguments, paired_ratio, report, time_interleaved

from echoquad_export.precision.calibration_set import Ranges
from echoquad_export.precision.quantize import activation_tensors, prepare, quantize
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import SlotPool
from echoquad_runtime.quadrants import frame_quadrants
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.runs.checkpoint import load_run

Quadrants = np.ndarray

AS_TRAINED = "int8, first convolution as trained"
AIM = 1.10  # times plain OpenVINO with its best graph


def main() -> None:
    parser = arguments(__doc__, run=True, frames=False, rounds=60)
    parser.add_argument("--openvino-python", help="Python of an environment with onnxruntime-openvino and openvino")
    parser.add_argument("--untimed", type=int, default=1, help="frames before the timed one (default %(default)s)")
    options = parser.parse_args()

    bundle = Bundle(options.bundle)
    size = bundle.contract.input_size
    quadrants = np.random.default_rng(0).integers(0, 256, (4, 1, size, size), np.uint8)
    calls: dict[str, Callable[[], object]] = torch_calls(options.run, quadrants, options.threads)
    for precision in bundle.precisions:
        engine = OnnxEngine(bundle, precision=precision, device="cpu", threads=options.threads)
        slots = SlotPool(engine, 1)
        calls[f"EchoQuad, {precision}"] = lambda slots=slots: slots.run(quadrants[None], 1)  # type: ignore[misc]
    with openvino_calls(bundle, options.openvino_python, options.threads) as (others, versions):
        times = time_interleaved({**calls, **others}, options.rounds, untimed=options.untimed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    single = medians.get("EchoQuad, fp32", next(iter(medians.values())))
    rows = [["engine", "ms a frame", "of EchoQuad, fp32"]]
    rows += [[name, f"{median:.2f}", f"{median / single:.2f}"] for name, median in medians.items()]
    ratios = openvino_ratios(times)
    notes = [f"{name}: EchoQuad on device openvino takes {ratio:.2f} times plain OpenVINO with its best graph "
             f"(aim: at most {AIM:.2f})." for name, ratio in ratios.items()]  # fmt: skip
    if not others:
        notes = ["OpenVINO was not measured; give --openvino-python."]
    else:
        notes.append(f"OpenVINO ran in a separate environment: {', '.join(map(' '.join, versions.items()))}.")
    record = {
        "input_size": size,
        "rounds": options.rounds,
        "untimed": options.untimed,
        "median_ms": medians,
        "openvino_ratios": ratios,
    }
    report("engines", rows, record, options.results, threads=options.threads, notes=notes)


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


@contextmanager
def openvino_calls(
    bundle: Bundle, python: str | None, threads: int
) -> Iterator[tuple[dict[str, Callable[[], object]], dict[str, str]]]:
    """Start `workers/openvino_worker.py`; yield its calls and versions, both empty if `python` is None."""
    if python is None:
        yield {}, {}
        return
    with TemporaryDirectory() as folder:
        if {"fp32", "int8"} <= set(bundle.precisions):
            Path(folder, f"{AS_TRAINED}.onnx").write_bytes(plain_int8(bundle))
        worker = Path(__file__).with_name("workers") / "openvino_worker.py"
        line = [python, str(worker), str(bundle.folder.resolve()), folder, str(threads)]
        with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None

            def ask(name: str) -> str:
                process.stdin.write(f"{name}\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                return answer()

            def answer() -> str:
                found = process.stdout.readline()  # type: ignore[union-attr]
                if not found:
                    raise SystemExit(f"{python}: the OpenVINO worker ended early; see its error above")
                return found

            found: dict[str, Any] = json.loads(answer())
            yield {name: lambda name=name: ask(name) for name in found["calls"]}, found["versions"]  # type: ignore[misc]
            process.stdin.close()


def openvino_ratios(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return EchoQuad's time on the device openvino over that of plain OpenVINO with its best graph, by precision."""
    found = {}
    for name, ours in times.items():
        if name.endswith(", device openvino"):
            precision = name.split(", ")[1]
            peers = [f"OpenVINO, {precision}", *([f"OpenVINO, {AS_TRAINED}"] if precision == "int8" else [])]
            best = min((times[peer] for peer in peers if peer in times), key=statistics.median)
            found[precision] = paired_ratio(ours, best)
    return found


def plain_int8(bundle: Bundle) -> bytes:
    """Quantize the bundle's float32 graph and keep the first convolution as trained; golden frames calibrate it."""
    model = prepare(bundle.read_model("fp32"), bundle.contract, space_to_depth=False)
    frames = np.stack([frame_quadrants(frame, bundle.contract)[:, 0] for frame in bundle.read_golden().frames])
    return quantize(model, Ranges(model, frames, activation_tensors(model)))


if __name__ == "__main__":
    main()
