"""A whole service with a tiny bundle behind a real server, and clients of it.

They end with their module: the threads of an idle service take processor time, which other tests measure.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from echoquad_runtime.quadrants import Grey
from echoquad_serve.config import HttpConfig, ModelConfig, MonitoringConfig, ServiceConfig, StoreConfig
from echoquad_serve.http.limits import Limits
from echoquad_serve.service import BedsideService

sys.path.append(str(Path(__file__).parent))  # not first: its name is conftest, too

from real_server import LIMITS, Running, Served


@pytest.fixture(scope="module")
def open_service() -> Iterator[Callable[..., BedsideService]]:
    """Return a function that starts a service with a bundle, and waits until it is ready."""
    services: list[BedsideService] = []

    def start(bundle: Path, folder: Path, **model: Any) -> BedsideService:
        config = ServiceConfig(
            model=ModelConfig(device="cpu", threads=2, **model),
            store=StoreConfig(folder, min_free_mb=1),
            monitoring=MonitoringConfig(audit_log=False),
        )
        services.append(BedsideService(bundle, config))
        services[-1].start()
        for _ in range(600):
            if not services[-1].unready_reasons():
                return services[-1]
            threading.Event().wait(0.05)
        raise AssertionError(services[-1].unready_reasons())

    yield start
    for service in services:
        service.close()


@pytest.fixture(scope="module")
def run_server() -> Iterator[Callable[..., Served]]:
    """Return a function that serves a service on a free port of this machine."""
    servers: list[Running] = []

    def run(service: BedsideService, limits: Limits = LIMITS, config: HttpConfig | None = None) -> Served:
        servers.append(Running(service, limits, config or HttpConfig(max_body_mb=1)))
        return servers[-1].served

    yield run
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def service(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, open_service: Callable[..., BedsideService]
) -> BedsideService:
    return open_service(tiny_bundle, tmp_path_factory.mktemp("kserve") / "store")


@pytest.fixture(scope="module")
def served(service: BedsideService, run_server: Callable[..., Served]) -> Served:
    """A server with the limits of `LIMITS`."""
    return run_server(service)


@pytest.fixture(scope="module")
def roomy(service: BedsideService, run_server: Callable[..., Served]) -> Served:
    """A server with the default limits."""
    return run_server(service, replace(Limits(), linger_s=0.5), HttpConfig())


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{served.address}", timeout=20.0, trust_env=False) as client:
        yield client


@pytest.fixture
def frames(make_frame: Callable[..., Grey]) -> np.ndarray:
    """Three synthetic frames, uint8 [3, 60, 80]."""
    return np.stack([make_frame(seed) for seed in range(3)])
