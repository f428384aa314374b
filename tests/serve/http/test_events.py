"""The event stream and the live view: order, resumption, slow clients, limits, and the end of the service."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from .conftest import FAST, RunningServer, ServerFactory, read_all
from .fake_backend import FakeBackend

GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n"


class Events:
    """An event stream, read as a browser reads it."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.comments = 0

    def next(self, *names: str) -> tuple[str, str, Any]:
        """Return name, id and data of the next event, of some name if one is given."""
        fields: dict[str, str] = {}
        for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "event" in fields:
                if not names or fields["event"] in names:
                    return fields["event"], fields.get("id", ""), json.loads(fields["data"])
                fields = {}
            else:
                fields = {}
        raise AssertionError("the stream ended")

    def numbers(self, count: int) -> list[int]:
        return [self.next("result")[2]["number"] for _ in range(count)]


@contextmanager
def open_events(server: RunningServer, last: str | None = None) -> Iterator[Events]:
    headers = {} if last is None else {"Last-Event-ID": last}
    with httpx.stream("GET", f"{server.url}/api/v1/events", headers=headers, timeout=5.0, trust_env=False) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        stream = Events(answer.iter_lines())
        if last is None:
            assert stream.next()[0] == "status"  # from here on, events arrive
        yield stream


def until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_new_client_gets_the_state_and_then_what_happens(server: RunningServer, backend: FakeBackend) -> None:
    with open_events(server) as stream:
        result = backend.invent_result("next.png")
        assert stream.next("result") == ("result", "6", json.loads(json.dumps(dict_of(result.number, backend))))
        backend.emit("live", {"row": None, "captured": 1.0, "age_ms": 2.0, "dropped": 3, "state": "frozen"})
        assert stream.next("live")[2]["state"] == "frozen"
        backend.emit("status", {"ready": False})
        assert stream.next("status")[2] == {"ready": False}


def dict_of(number: int, backend: FakeBackend) -> dict[str, Any]:
    return backend.results(after=number - 1, limit=1)[0].to_dict()


def test_silence_is_filled_with_comments(server: RunningServer, backend: FakeBackend) -> None:
    with open_events(server) as stream:
        timer = threading.Timer(0.35, backend.invent_result, ["late.png"])
        timer.start()
        stream.next("result")
        timer.join()
        assert stream.comments >= 2


@pytest.mark.parametrize("last", [0, 1, 3, 5, 9])
def test_client_that_comes_back_misses_nothing(server: RunningServer, backend: FakeBackend, last: int) -> None:
    with open_events(server, str(last)) as stream:
        replayed = list(range(last + 1, 6))
        assert stream.numbers(len(replayed)) == replayed
        stream.next("status")
        for _ in range(5):
            backend.invent_result("new.png")
        expected = [number for number in range(6, 11) if number > last]
        assert stream.numbers(len(expected)) == expected


def test_long_absence_is_read_in_pages(serve: ServerFactory, backend: FakeBackend) -> None:
    for _ in range(745):
        backend.invent_result("old.png")
    with open_events(serve(), "3") as stream:
        assert stream.numbers(747) == list(range(4, 751))


def test_results_out_of_order_and_twice_arrive_in_order_and_once(server: RunningServer, backend: FakeBackend) -> None:
    with open_events(server) as stream:
        listeners, backend._listeners = backend._listeners, {}
        dicts = [dict_of(backend.invent_result("x.png").number, backend) for _ in range(4)]
        backend._listeners = listeners
        for index in (1, 0, 1, 3, 3, 2):
            backend.emit("result", dicts[index])
        assert stream.numbers(4) == [6, 7, 8, 9]


def test_results_under_load_arrive_once_each_at_every_client(serve: ServerFactory, backend: FakeBackend) -> None:
    server = serve(limits=replace(FAST, event_queue=4))  # most are read from the store again
    received: list[list[int]] = []

    def read(stream: Events) -> None:
        received.append(stream.numbers(400))

    with open_events(server) as one, open_events(server) as two:
        threads = [threading.Thread(target=read, args=(stream,)) for stream in (one, two)]
        for thread in threads:
            thread.start()
        for _ in range(400):
            backend.invent_result("load.png")
        for thread in threads:
            thread.join(10)
    assert received == [list(range(6, 406))] * 2


def test_newest_live_decision_wins(server: RunningServer, backend: FakeBackend) -> None:
    with server.connect() as connection:
        connection.sendall(GET % (b"/api/v1/events", b""))
        until(lambda: backend.listeners == 1)
        for number in range(20_000):
            backend.emit("live", {"number": number, "filler": "x" * 500})
        time.sleep(0.1)
        received, end = b"", time.monotonic() + 5
        while b'"number":19999' not in received and time.monotonic() < end:
            received += connection.recv(1 << 20)
    assert b'"number":19999' in received
    assert received.count(b"event: live") < 20_000


def test_event_that_cannot_be_encoded_is_dropped_alone(
    server: RunningServer, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with open_events(server) as stream:
        backend.emit("live", {"age_ms": float("nan"), "name": "Doe^Jane"})
        backend.emit("status", {"fine": True})
        assert stream.next() == ("status", "", {"fine": True})
    assert "ValueError" in caplog.text
    assert "Doe" not in caplog.text


def test_client_that_reads_nothing_is_disconnected(server: RunningServer, backend: FakeBackend) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(GET % (b"/api/v1/events", b""))
        until(lambda: backend.listeners == 1)
        end = time.monotonic() + 8
        while backend.listeners and time.monotonic() < end:
            backend.emit("status", {"filler": "x" * 200_000})
            time.sleep(0.02)
    assert backend.listeners == 0
    until(lambda: not server.app.state.context.events)


def test_clients_that_leave_are_forgotten(server: RunningServer, backend: FakeBackend) -> None:
    for _ in range(10):
        with open_events(server):
            assert backend.listeners >= 1
    until(lambda: backend.listeners == 0)


def test_one_client_too_many_is_told_when_to_come_back(server: RunningServer) -> None:
    with open_events(server), open_events(server), open_events(server):
        answer = httpx.get(f"{server.url}/api/v1/events", trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "E_HTTP_BUSY")
        assert answer.headers["retry-after"] == "5"
        head = httpx.head(f"{server.url}/api/v1/events", trust_env=False)
        assert head.status_code == 503


@pytest.mark.parametrize("last", ["x", "-1", "1e3", "99999999999999999999", "٣"])
def test_last_event_that_is_no_number_is_refused(client: httpx.Client, last: str) -> None:
    answer = client.get("/api/v1/events", headers={"Last-Event-ID": last.encode()})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "E_HTTP_PARAMETER")


def test_end_of_the_service_ends_streams_at_once_and_requests_are_answered(
    server: RunningServer, backend: FakeBackend
) -> None:
    backend.live = True
    backend.delay = 0.3
    answers: list[int] = []

    def post() -> None:
        headers = {"Content-Type": "image/png"}
        answers.append(
            httpx.post(f"{server.url}/api/v1/predict", content=b"x", headers=headers, trust_env=False).status_code
        )

    with server.connect() as one, server.connect() as two:
        one.sendall(GET % (b"/api/v1/events", b""))
        two.sendall(GET % (b"/api/v1/live/stream", b""))
        until(lambda: backend.listeners == 1 and len(server.app.state.context.live) == 1)
        backend.next_live_frame()
        two.recv(100)
        request = threading.Thread(target=post)
        request.start()
        until(lambda: backend.accepted != [])
        start = time.monotonic()
        server.uvicorn.should_exit = True
        assert read_all(one).endswith(b"0\r\n\r\n")
        assert read_all(two).endswith(b"0\r\n\r\n")
        assert time.monotonic() - start < 1
        request.join(5)
    assert answers == [200]
    server._thread.join(3)
    assert not server._thread.is_alive()


# The live view


def test_live_view_is_a_stream_of_whole_pictures(server: RunningServer, backend: FakeBackend) -> None:
    backend.live = True
    with server.connect() as connection:
        connection.sendall(GET % (b"/api/v1/live/stream", b""))
        received = b""
        for _ in range(60):
            backend.next_live_frame()
            connection.settimeout(0.05)
            try:
                received += connection.recv(1 << 20)
            except TimeoutError:
                continue
            if received.count(b"--frame") > 4:
                break
    assert b"content-type: multipart/x-mixed-replace; boundary=frame" in received
    assert received.count(b"\xff\xd8\xff") >= 3
    assert received.count(b"Content-Type: image/jpeg") >= 3
    until(lambda: not server.app.state.context.live)


def test_without_a_live_source_there_is_no_live_view(client: httpx.Client) -> None:
    answer = client.get("/api/v1/live/stream")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "E_LIVE_SOURCE")


def test_live_source_without_a_picture_is_told(client: httpx.Client, backend: FakeBackend) -> None:
    backend.live = True
    answer = client.get("/api/v1/live/stream")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "E_LIVE_SOURCE")
    assert answer.headers["retry-after"] == "2"


def test_fault_of_the_live_source_is_logged_without_values(
    client: httpx.Client, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Iterator[bytes]:
        raise RuntimeError("rtsp://user:secret@camera")
        yield b""

    monkeypatch.setattr(backend, "live_frames", broken)
    assert client.get("/api/v1/live/stream").status_code == 404
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


def test_viewers_are_limited_and_their_threads_end(server: RunningServer, backend: FakeBackend) -> None:
    backend.live = True
    with server.connect() as one, server.connect() as two:
        for connection in (one, two):
            connection.sendall(GET % (b"/api/v1/live/stream", b""))
        until(lambda: len(server.app.state.context.live) == 2)
        assert httpx.get(f"{server.url}/api/v1/live/stream", trust_env=False).status_code == 503

    def viewers() -> int:
        backend.next_live_frame()
        return sum(thread.name == "echoquad-http-live" for thread in threading.enumerate())

    until(lambda: viewers() == 0)
