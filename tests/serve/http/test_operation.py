"""Live, ready, info, status, metrics, and the change of the bundle."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import pytest

from echoquad_serve.config import HttpConfig
from echoquad_serve.http.app import create_app

from .conftest import RunningServer
from .fake_backend import FakeBackend


def test_live_and_ready_are_not_the_same(client: httpx.Client, backend: FakeBackend) -> None:
    assert client.get("/api/v1/ready").json() == {"ready": True, "reasons": []}
    backend.faults.not_ready = True
    answer = client.get("/api/v1/ready")
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "reasons": ["the bundle is being tested"]}
    assert answer.headers["retry-after"] == "5"
    assert client.get("/api/v1/live").json() == {"live": True}


def test_state_is_that_of_the_service(client: httpx.Client, backend: FakeBackend) -> None:
    assert client.get("/api/v1/info").json() == backend.info()
    assert client.get("/api/v1/status").json() == backend.status()
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert metrics.content == backend.metrics()


def test_state_is_answered_while_all_predictions_hang(server: RunningServer, backend: FakeBackend) -> None:
    backend.faults.hang = True
    headers = {"Content-Type": "image/png"}
    threads = [
        threading.Thread(
            target=httpx.post,
            args=(f"{server.url}/api/v1/predict",),
            kwargs={"content": b"x", "headers": headers, "trust_env": False},
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while len(backend.accepted) < 4:
        time.sleep(0.01)
    start = time.monotonic()
    for path in ("live", "ready", "status", "info", "results"):
        assert httpx.get(f"{server.url}/api/v1/{path}", trust_env=False).status_code == 200
    assert time.monotonic() - start < 0.4
    for thread in threads:
        thread.join()


# The bundle


@pytest.fixture
def bundles(tmp_path: Path, server: RunningServer) -> Path:
    folder = tmp_path / "bundles"
    folder.joinpath("next").mkdir()
    folder.joinpath("file").write_text("")
    tmp_path.joinpath("outside").mkdir()
    return folder


def test_bundle_is_loaded_by_name_and_rolled_back(client: httpx.Client, bundles: Path, backend: FakeBackend) -> None:
    answer = client.post("/api/v1/bundle", json={"folder": "next"})
    assert (answer.status_code, answer.json()) == (200, backend.info())
    assert backend.loaded == ["next"]
    assert client.post("/api/v1/bundle/rollback").status_code == 200
    answer = client.post("/api/v1/bundle/rollback")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "E_BUNDLE")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../outside", "next/", "./next", "file", "missing", "/", "next\x00", "C:"]
)
def test_name_is_no_path(client: httpx.Client, bundles: Path, backend: FakeBackend, name: str) -> None:
    answer = client.post("/api/v1/bundle", json={"folder": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "E_BUNDLE_NOT_FOUND")
    assert backend.loaded == []


@pytest.mark.parametrize(
    "body",
    [b"", b"next", b"[]", b'{"folder": 1}', b'{"folder": "next", "x": 1}', b'{"path": "next"}', b"\xff", b"[" * 60000],
)
def test_body_that_is_not_understood_is_refused(client: httpx.Client, bundles: Path, body: bytes) -> None:
    answer = client.post("/api/v1/bundle", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "E_HTTP_BODY")


def test_body_of_another_type_or_size_is_refused(client: httpx.Client, bundles: Path, backend: FakeBackend) -> None:
    answer = client.post("/api/v1/bundle", content=b'{"folder":"next"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415  # what a form of another site could send
    answer = client.post("/api/v1/bundle", content=bytes(70_000), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert backend.loaded == []


def test_refused_bundle_is_told(client: httpx.Client, bundles: Path, backend: FakeBackend) -> None:
    backend.faults.bundle_refused = True
    answer = client.post("/api/v1/bundle", json={"folder": "next"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "E_BUNDLE")
    assert "self-test" in answer.json()["error"]["message"]


def test_one_request_at_a_time_changes_the_bundle(
    client: httpx.Client, bundles: Path, backend: FakeBackend, server: RunningServer
) -> None:
    backend.faults.hang = True
    first = threading.Thread(
        target=httpx.post,
        args=(f"{server.url}/api/v1/bundle",),
        kwargs={"json": {"folder": "next"}, "trust_env": False},
    )
    first.start()
    assert backend.hangs.wait(10)
    answer = client.post("/api/v1/bundle/rollback")
    assert answer.headers["retry-after"]
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "E_HTTP_BUSY")
    backend.close()
    first.join(5)
    assert backend.loaded == ["next"]


def test_without_a_bundle_folder_none_is_loaded(backend: FakeBackend) -> None:
    import asyncio

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(backend, HttpConfig()), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/api/v1/bundle", json={"folder": "next"})

    answer = asyncio.run(post())
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "E_CONFIG")
