"""Time the parts of a start in a fresh process, for `gpu.py`.

    python benchmarks/workers/start_parts.py BUNDLE DEVICE PRECISION FRAMES

prints the seconds of each part as a line of JSON, for an inference slot of FRAMES frames.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise

PARTS = ("imports", "bundle", "session", "slot", "self-test", "self-test again")


def main(bundle: str, device: str, precision: str, frames: int) -> None:
    times = [time.perf_counter()]
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
    from echoquad_runtime.engine.onnx_engine import OnnxEngine
    from echoquad_runtime.engine.self_test import SelfTest

    load_onnxruntime()
    times.append(time.perf_counter())
    opened = Bundle(bundle)
    times.append(time.perf_counter())
    engine = OnnxEngine(opened, device=device, precision=precision)  # type: ignore[arg-type]
    times.append(time.perf_counter())
    slot = engine.open_slot(frames)
    times.append(time.perf_counter())
    for _ in range(2):  # the first run of a shape is slower: cuDNN chooses its kernels
        SelfTest(opened, engine, frames)(slot)
        times.append(time.perf_counter())
    seconds = [end - begin for begin, end in pairwise(times)]
    print(json.dumps(dict(zip(PARTS, seconds, strict=True))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
