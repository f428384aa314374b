"""Tests of the service as a whole: a real process, real senders, real receivers."""

from __future__ import annotations

import gc
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

for _package in ("starlette", "uvicorn", "prometheus_client", "pynetdicom", "highdicom"):
    pytest.importorskip(_package)

from .load_senders import dicom_template  # noqa: E402
from .result_receivers import Archive, Webhook  # noqa: E402
from .service_process import ServiceProcess  # noqa: E402

Start = Callable[..., ServiceProcess]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Allow the peers of the tests to leave sockets to the garbage collector, as pynetdicom does at times."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:Exception ignored in. <(ssl|socket)"))
            item.add_marker(pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and SIGTERM"))


def pytest_runtest_logfinish() -> None:
    """Collect what a test has left, once its fixtures are gone, before other tests, which do not allow it, run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def start_service(tmp_path: Path, tiny_bundle: Path) -> Iterator[Start]:
    """Return a function that starts a service with tables of a configuration, and gives it back when it is ready."""
    services: list[ServiceProcess] = []

    def start(tables: str = "", store: str = "min_free_mb = 0", bundle: Path = tiny_bundle) -> ServiceProcess:
        services.append(ServiceProcess(bundle, tmp_path / f"service-{len(services)}", tables, store))
        return services[-1].start()

    yield start
    for service in services:
        if service.running:
            service.kill()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    one = Webhook()
    yield one
    one.close()


@pytest.fixture
def archive() -> Iterator[Archive]:
    one = Archive()
    yield one
    one.close()


@pytest.fixture(scope="session")
def frames(make_frame: Callable[..., object]) -> list[bytes]:
    """Return 20 frames as PNG."""
    encoded = []
    for seed in range(20):
        stream = io.BytesIO()
        Image.fromarray(make_frame(seed)).save(stream, "PNG")
        encoded.append(stream.getvalue())
    return encoded


@pytest.fixture(scope="session")
def templates(make_frame: Callable[..., object]) -> list:
    """Return DICOM objects, to be sent under UIDs of their own."""
    return [dicom_template(make_frame(seed)) for seed in range(5)]
