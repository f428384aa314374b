"""The KServe routes as a part of the service: readiness, bundles that change, limits, and protection."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from real_server import LIMITS, Served

from echoquad_runtime.errors import FrameError
from echoquad_runtime.frames.frame_file import Failure
from echoquad_serve.config import HttpConfig
from echoquad_serve.http.error_responses import ApiError
from echoquad_serve.http.kserve import routes
from echoquad_serve.service import BedsideService

INFER = "/v2/models/echoquad/infer"
BODY = json.dumps(
    {"inputs": [{"name": "frames", "datatype": "UINT8", "shape": [1, 4, 4], "data": list(range(16))}]}
).encode()


def error_of(answer: httpx.Response) -> str:
    value = answer.json()
    assert list(value) == ["error"]
    assert isinstance(value["error"], str)
    return value["error"]


@pytest.fixture
def own(
    make_tiny_bundle: Callable[..., Path],
    tmp_path: Path,
    open_service: Callable[..., BedsideService],
    run_server: Callable[..., Served],
) -> Served:
    """A service that the test may change."""
    bundle = make_tiny_bundle(tmp_path / "first bundle")
    return run_server(open_service(bundle, tmp_path / "store"), LIMITS)


@pytest.fixture
def own_client(own: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{own.address}", timeout=20.0, trust_env=False) as client:
        yield client


# Names


def test_a_bundle_has_its_name_and_a_version_of_its_own(own: Served, own_client: httpx.Client) -> None:
    version = own.service.info()["bundle"]["sha256"][:12]
    for path in ("/v2/models/first%20bundle", f"/v2/models/first%20bundle/versions/{version}"):
        assert own_client.get(path).json()["versions"] == [version]
        assert own_client.get(f"{path}/ready").json() == {"name": "first bundle", "ready": True}
        answer = own_client.post(f"{path}/infer", content=BODY).json()
        assert (answer["model_name"], answer["model_version"]) == ("first bundle", version)
    for path in ("/v2/models/first%20bundle/versions/1", "/v2/models/First%20bundle", "/v2/models/x%0ay%1b"):
        for answer in (own_client.get(path), own_client.get(f"{path}/ready"), own_client.post(f"{path}/infer")):
            assert answer.status_code == 404
            assert error_of(answer).isprintable()


def test_a_new_bundle_takes_over_with_another_name_and_version(
    own: Served, own_client: httpx.Client, make_tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    first = own_client.get("/v2/models/echoquad").json()
    pinned = f"/v2/models/echoquad/versions/{first['versions'][0]}/infer"
    assert own_client.post(pinned, content=BODY).status_code == 200
    own.service.load_bundle(make_tiny_bundle(tmp_path / "second", keep=0.8))
    second = own_client.get("/v2/models/echoquad").json()
    assert second["versions"] != first["versions"]
    assert second["properties"]["bundle"] == "second"
    assert own_client.post(INFER, content=BODY).json()["parameters"]["bundle"] == "second"
    # A client that has pinned a bundle learns that it is gone, rather than getting the decisions of another one.
    assert own_client.post(pinned, content=BODY).status_code == 404
    assert own_client.get("/v2/models/first%20bundle/ready").status_code == 404
    own.service.roll_back()
    assert own_client.post(pinned, content=BODY).json()["parameters"]["bundle"] == "first bundle"


def test_no_answer_names_another_bundle_than_the_one_that_decided(
    own: Served, make_tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Swap bundles all the time. The two decide the frame differently."""
    own.service.load_bundle(make_tiny_bundle(tmp_path / "second", classes=("ASD", "NORM"), temperature=9.0))
    seen: dict[str, set[float]] = {}
    ended = threading.Event()

    def swap() -> None:
        while not ended.is_set():
            own.service.roll_back()

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        with httpx.Client(base_url=f"http://{own.address}", trust_env=False) as client:
            for _ in range(200):
                answer = client.post(INFER, content=BODY).json()
                outputs = {output["name"]: output["data"] for output in answer["outputs"]}
                seen.setdefault(answer["model_version"], set()).add(outputs["probabilities"][0])
    finally:
        ended.set()
        swapping.join()
    assert len(seen) == 2
    first, second = seen.values()
    assert len(first) == len(second) == 1
    assert first != second


# Readiness


def test_nothing_but_live_answers_before_the_service_is_ready(
    own: Served, own_client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own.service, "unready_reasons", lambda: ["the bundle is being tested"])
    assert own_client.get("/v2/health/live").json() == {"live": True}
    assert own_client.get("/v2").status_code == 200
    for answer in (
        own_client.get("/v2/health/ready"),
        own_client.get("/v2/models/echoquad"),
        own_client.get("/v2/models/echoquad/ready"),
        own_client.post(INFER, content=BODY),
    ):
        assert answer.status_code == 503
        assert "being tested" in error_of(answer)
        assert int(answer.headers["retry-after"]) > 0
    monkeypatch.undo()
    assert own_client.get("/v2/health/ready").json() == {"ready": True}


# Load


class SlowPredictor:
    """A predictor whose decisions wait until they are released."""

    def __init__(self, predictor: Any) -> None:
        self._predictor = predictor
        self.released = threading.Event()
        self.running = self.most_running = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)

    def predict_tasks(self, tasks: Any) -> Iterator[Any]:
        with self._lock:
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        self.released.wait(20)
        with self._lock:
            self.running -= 1
        return self._predictor.predict_tasks(tasks)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it does not happen")


def test_slow_inference_blocks_nothing_else_and_is_bounded(
    own: Served, own_client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowPredictor(own.service.predictor())
    monkeypatch.setattr(own.service, "predictor", lambda: slow)
    with ThreadPoolExecutor(LIMITS.tensors) as threads:
        pending = [
            threads.submit(httpx.post, f"http://{own.address}{INFER}", content=BODY, timeout=20)
            for _ in range(LIMITS.tensors)
        ]
        wait_for(lambda: own.tensors_in_flight == LIMITS.tensors and slow.running == LIMITS.tensor_threads)
        refused = own_client.post(INFER, content=BODY)
        assert int(refused.headers["retry-after"]) > 0
        assert "Retry-After" in error_of(refused)
        start = time.monotonic()
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/echoquad", "/api/v1/status", "/metrics"):
            assert own_client.get(path).status_code == 200
        # A frame of another client, through the queue, does not wait for tensors.
        png = b"P5 4 4 255 " + bytes(16)
        assert own_client.post("/api/v1/predict", content=png).status_code in (200, 422)
        assert time.monotonic() - start < 5
        slow.released.set()
        assert [one.result().status_code for one in pending] == [200] * LIMITS.tensors
    assert slow.most_running == LIMITS.tensor_threads
    assert own_client.post(INFER, content=BODY).status_code == 200


def test_clients_that_send_no_body_are_bounded_and_release_their_places(served: Served, client: httpx.Client) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nHost: {served.address}\r\nContent-Length: 100\r\n\r\n".encode()
    silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(LIMITS.tensors)]
    try:
        for connection in silent:
            connection.sendall(head)
        wait_for(lambda: served.tensors_in_flight == LIMITS.tensors)
        assert client.post(INFER, content=BODY).status_code == 429
    finally:
        for connection in silent:
            connection.close()
    wait_for(lambda: client.post(INFER, content=BODY).status_code == 200)


def test_hanging_inference_ends_with_an_answer_and_keeps_no_body(
    service: BedsideService, run_server: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = run_server(service, replace(LIMITS, predict_s=0.2, tensor_threads=1))
    slow = SlowPredictor(service.predictor())
    monkeypatch.setattr(service, "predictor", lambda: slow)
    bodies: list[Any] = []
    monkeypatch.setattr(routes, "_receive", remember(bodies))
    with httpx.Client(base_url=f"http://{served.address}", timeout=20.0, trust_env=False) as client:
        for _ in range(2 * LIMITS.tensors):
            answer = client.post(INFER, content=BODY)
            assert answer.status_code == 504
            assert "0.2 s" in error_of(answer)
            assert int(answer.headers["retry-after"]) > 0
        assert served.tensors_in_flight == 0
        assert bodies == [[]] * 2 * LIMITS.tensors
        slow.released.set()
        wait_for(lambda: client.post(INFER, content=BODY).status_code == 200)
    assert slow.most_running == 1


def remember(bodies: list[Any]) -> Any:
    receive = routes._receive

    async def remembering(*args: Any) -> Any:
        bodies.append(await receive(*args))
        return bodies[-1]

    return remembering


# Faults


def test_an_unexpected_fault_shows_nothing_of_itself(
    own: Served, own_client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(SlowPredictor):
        def predict_tasks(self, tasks: Any) -> Iterator[Any]:
            raise RuntimeError("Doe^Jane")

    monkeypatch.setattr(own.service, "predictor", lambda: Faulty(BedsideService.predictor(own.service)))
    with caplog.at_level(logging.DEBUG):
        answer = own_client.post(INFER, content=BODY)
    assert answer.status_code == 500
    assert "fault" in error_of(answer)
    assert "Doe" not in answer.text + caplog.text


def test_a_frame_that_cannot_be_decided_is_named(
    own: Served, own_client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(SlowPredictor):
        def predict_tasks(self, tasks: Any) -> Iterator[Any]:
            return iter([Failure(task.name, FrameError("the network's answer is not a number")) for task in tasks])

    monkeypatch.setattr(own.service, "predictor", lambda: Failing(BedsideService.predictor(own.service)))
    answer = own_client.post(INFER, content=BODY)
    assert answer.status_code == 422
    assert error_of(answer) == "frame 1 of 1: the network's answer is not a number"


# Protection


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v2/nothing", {}, 404),
        ("GET", "/v2/models", {}, 404),
        ("GET", "/v2/models/echoquad/config", {}, 404),
        ("POST", "/v2/repository/index", {}, 404),
        ("POST", "/v2/models/echoquad/generate", {}, 404),
        ("GET", INFER, {}, 405),
        ("DELETE", INFER, {}, 405),
        ("POST", "/v2", {}, 405),
        ("GET", "/v2?x=1", {}, 400),
        ("POST", INFER, {"Content-Type": "text/plain"}, 415),
        ("POST", INFER, {"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ("POST", INFER, {"Host": "evil.example"}, 421),
        ("POST", INFER, {"Origin": "http://evil.example"}, 403),
        ("GET", "/v2", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", INFER, {"X-Forwarded-For": "127.0.0.1"}, 403),
    ],
)
def test_requests_are_refused_in_the_form_of_the_protocol(
    client: httpx.Client, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    answer = client.request(method, path, content=BODY if method == "POST" else None, headers=headers)
    assert answer.status_code == status
    assert error_of(answer).isprintable()
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_other_machines_need_the_token(
    service: BedsideService, run_server: Callable[..., Served], tmp_path: Path
) -> None:
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    served = run_server(service, LIMITS, HttpConfig(token_file=secret))
    far = {"X-Forwarded-For": "10.0.0.9"}
    with httpx.Client(base_url=f"http://{served.address}", trust_env=False, headers=far) as client:
        refused = client.post(INFER, content=BODY)
        assert refused.status_code == 401
        error_of(refused)
        token = {"Authorization": "Bearer 0123456789abcdef"}
        assert client.post(INFER, content=BODY, headers=token).status_code == 200


def test_a_header_given_twice_is_refused(served: Served) -> None:
    for name in ("Inference-Header-Content-Length: 5", "Content-Encoding: gzip"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            lines = [f"POST {INFER} HTTP/1.1", f"Host: {served.address}", "Connection: close", "Content-Length: 0"]
            connection.sendall("\r\n".join([*lines, name, name, "", ""]).encode())
            answer = b""
            while data := connection.recv(65536):
                answer += data
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"twice" in answer


def test_logs_and_metrics_name_the_route_and_no_model(
    served: Served, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "echoquad_serve"):
        assert client.get("/v2/models/Doe%5EJane").status_code == 404
    for _ in range(100):  # it is told after the answer
        if ("GET", "/v2/models/{model}", 404) in served.seen:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the route was not told")
    assert "Doe" not in caplog.text


def test_tensors_leave_nothing_in_the_queue_and_no_result(own: Served, own_client: httpx.Client) -> None:
    assert own_client.post(INFER, content=BODY).status_code == 200
    assert own_client.get("/api/v1/results").json()["results"] == []
    assert own.service.status()["queue"]["waiting"] == 0
    assert list(own.service.incoming.iterdir()) == []


def test_memory_of_a_refused_bomb_is_bounded() -> None:
    import tracemalloc
    import zlib

    from echoquad_serve.http.kserve.content_coding import inflate

    bomb = zlib.compress(np.zeros(256 << 20, np.uint8))
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as caught:
            inflate(bomb, "deflate", 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.status_code == 413
