"""CPU use of a session: no processor time between frames, and no more threads than requested."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.onnx_header import INPUT
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices import onnxruntime_loader as wheels
from echoquad_runtime.devices.session_factory import open_session

if not wheels.installed_wheels():
    pytest.skip("onnxruntime is not installed", allow_module_level=True)

ROOT = Path(wheels.__file__).parents[2]


def test_cpu_is_idle_between_live_frames(tiny_bundle: Path, make_tiny_graph: Callable[..., bytes]) -> None:
    contract: Contract = replace(Bundle(tiny_bundle).contract, input_size=224)
    session = open_session(make_tiny_graph(contract), device="cpu", threads=2, spinning=True).session
    frame = np.zeros((4, 1, 224, 224), np.uint8)
    busy = elapsed = 0.0
    for _ in range(30):
        session.run(None, {INPUT: frame})
        cpu, wall = time.process_time(), time.perf_counter()
        time.sleep(1 / 30)
        busy += time.process_time() - cpu
        elapsed += time.perf_counter() - wall
    # 0.2 % on a quiet machine, 1.6 % beside other tests; threads that spin between frames take half a core.
    assert busy < 0.05 * elapsed, f"{100 * busy / elapsed:.1f} % of a core between frames"


THREADS = """
import os, sys
def count(): return len(os.listdir("/proc/self/task"))
import numpy
from echoquad_runtime.devices.execution_providers import PROBE_MODEL
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
from echoquad_runtime.devices.session_factory import open_session
before = count()  # numpy may have started threads for linear algebra, which sleep
load_onnxruntime()
imported = count()
kept = [open_session(PROBE_MODEL, device="cpu", threads=int(number)) for number in sys.argv[1:]]
for opened in kept:
    opened.session.run(None, {"x": numpy.zeros((1, 1, 2, 2), numpy.float32)})
print(imported - before, count() - imported)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list a process's threads")
@pytest.mark.parametrize("threads", [[1], [2], [5], [1, 3]])
def test_session_starts_no_more_threads_than_requested(threads: list[int]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS, *map(str, threads)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # The calling thread is one of a session's threads.
    assert done.stdout.split() == ["0", str(sum(threads) - len(threads))]
