"""Ten times more requests than the service can decide: those accepted are as fast as before, the others are told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .service_process import ServiceProcess

PLACES = 16  # predictions at the same time, `Limits.predictions`
CLIENTS = 160


def load(port: int, frame: Path, clients: int, rate: float, seconds: float) -> dict[str, Any]:
    program = Path(__file__).with_name("load_generator.py")
    command = [sys.executable, program, *map(str, (port, frame, clients, rate, seconds))]
    ended = subprocess.run(command, capture_output=True, check=True, timeout=seconds + 90)
    return json.loads(ended.stdout)  # type: ignore[no-any-return]


def p99(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99))


@pytest.mark.parametrize("seconds", [1.5, pytest.param(30.0, marks=pytest.mark.slow)])
def test_overload_is_refused_at_once_and_accepted_requests_keep_their_latency(
    start_service: Callable[..., ServiceProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float
) -> None:
    service = start_service()
    frame = tmp_path / "frame.png"
    Image.fromarray(np.tile(np.arange(2400, dtype=np.uint8), (1800, 1))).save(frame)  # about 20 ms to decode
    load(service.port, frame, PLACES, 0, 1.0)
    at_capacity = load(service.port, frame, PLACES, 0, seconds)
    assert set(at_capacity["statuses"]) == {"200"}
    capacity = at_capacity["statuses"]["200"] / seconds
    before = service.memory_mb(), service.threads()

    overload = load(service.port, frame, CLIENTS, 10 * capacity, seconds)
    accepted, refused = overload["statuses"].get("200", 0), overload["statuses"].get("429", 0)
    figures = (
        f"capacity {capacity:.0f}/s, p99 {1e3 * p99(at_capacity['accepted_s']):.0f} ms; offered {10 * capacity:.0f}/s: "
        f"sent {(accepted + refused) / seconds:.0f}/s, accepted {accepted / seconds:.0f}/s, p99 "
        f"{1e3 * p99(overload['accepted_s']):.0f} ms; refused in p99 {1e3 * p99(overload['refused_s']):.0f} ms; "
        f"memory {before[0]:.0f} -> {service.memory_mb():.0f} MB"
    )
    with capsys.disabled():
        print(f"\n{figures}")  # noqa: T201
    assert set(overload["statuses"]) == {"200", "429"}
    assert overload["cut"] == overload["without_retry_after"] == 0
    # The load generator takes its share of the processor, and in the everyday run so do other tests.
    share, slack = (0.5, 0.1) if seconds > 10 else (0.2, 1.0)
    assert accepted / seconds > share * capacity
    assert p99(overload["accepted_s"]) < 1.5 * p99(at_capacity["accepted_s"]) + slack
    assert max(overload["refused_s"]) < 2.0
    assert service.memory_mb() < before[0] + 60
    assert service.threads() <= before[1] + 2
    status = service.status()
    assert status["ready"] and status["queue"]["waiting"] == 0
