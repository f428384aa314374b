"""``POST /api/v1/predict``: answers, names, limits, and that no file stays behind."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_serve.config import HttpConfig
from echoquad_serve.errors import StorageFullError
from echoquad_serve.http.routes.uploads import Upload, file_name

from .conftest import FAST, RunningServer, ServerFactory, read_all
from .fake_backend import FakeBackend

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
AS_PNG = {"Content-Type": "image/png"}


def until_empty(folder: Path) -> None:
    for _ in range(200):
        if not list(folder.iterdir()):
            return
        time.sleep(0.01)
    raise AssertionError(f"left behind: {list(folder.iterdir())}")


def test_frame_gets_its_result(client: httpx.Client, backend: FakeBackend) -> None:
    answer = client.post("/api/v1/predict?name=four.png", content=PNG, headers=AS_PNG)
    result = answer.json()
    assert answer.status_code == 200
    assert answer.headers["content-location"] == f"/api/v1/results/{result['id']}"
    assert (result["status"], result["origin"], result["number"], result["name"]) == ("done", "http", 6, "four.png")
    assert result["rows"][0]["file"] == "four.png"
    assert set(result) == {
        *("id", "number", "status", "origin", "name", "received", "finished", "rows", "failures", "bundle"),
        "timings_ms",
    }
    assert backend.accepted == [("four.png", "", PNG)]
    until_empty(backend.incoming)


def test_body_in_pieces_without_a_length_arrives_whole(serve: ServerFactory, backend: FakeBackend) -> None:
    server = serve(HttpConfig(max_body_mb=8))
    body = bytes(range(256)) * 4 * 4096  # 4 MiB, so that it is written in several parts
    pieces = (body[at : at + 100_000] for at in range(0, len(body), 100_000))
    answer = httpx.post(f"{server.url}/api/v1/predict", content=pieces, headers=AS_PNG, trust_env=False)
    assert answer.status_code == 200
    assert backend.accepted[0][2] == body


def test_failed_object_is_422_with_its_failures(client: httpx.Client) -> None:
    answer = client.post("/api/v1/predict", content=b"bad file", headers=AS_PNG)
    assert answer.status_code == 422
    assert answer.json()["failures"][0]["code"] == "E_FRAME_FORMAT"
    assert answer.json()["rows"] == []


def test_client_that_does_not_wait_gets_the_place_of_the_result(client: httpx.Client) -> None:
    answer = client.post("/api/v1/predict?wait=0", content=PNG, headers=AS_PNG)
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/api/v1/results/{answer.json()['id']}"
    assert client.get(answer.headers["location"]).json()["id"] == answer.json()["id"]


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("image/png", "image/png"),
        ("application/json, image/png", "image/png"),
        ("image/png;q=0.5, application/json", "application/json"),
        ("image/*", "application/json"),
        ("*/*", "application/json"),
        ("image/png;q=none", "application/json"),
    ],
)
def test_accept_chooses_between_picture_and_row(client: httpx.Client, accept: str, media_type: str) -> None:
    answer = client.post("/api/v1/predict?cam=1", content=PNG, headers={**AS_PNG, "Accept": accept})
    assert answer.headers["content-type"] == media_type
    assert answer.content.startswith(b"\x89PNG") is (media_type == "image/png")


def test_repeated_key_gets_the_first_result_and_leaves_no_file(client: httpx.Client, backend: FakeBackend) -> None:
    headers = {**AS_PNG, "Idempotency-Key": "exam 7, frame 3"}
    numbers = [client.post("/api/v1/predict", content=PNG, headers=headers).json()["number"] for _ in range(3)]
    assert numbers == [6, 6, 6]
    assert [key for _, key, _ in backend.accepted] == ["exam 7, frame 3"]
    until_empty(backend.incoming)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("not_ready", 503, "E_NOT_READY"),
        ("queue_full", 429, "E_QUEUE_FULL"),
        ("disk_full", 503, "E_STORAGE_FULL"),
        ("crash", 500, "E_UNEXPECTED"),
        ("hang", 504, "E_RESULT_TIMEOUT"),
    ],
)
def test_fault_of_the_service_is_told_and_leaves_no_file(
    client: httpx.Client, backend: FakeBackend, fault: str, status: int, code: str
) -> None:
    setattr(backend.faults, fault, True)
    answer = client.post("/api/v1/predict", content=PNG, headers=AS_PNG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in answer.headers) is (status != 500)
    assert "Doe" not in answer.text
    until_empty(backend.incoming)


def test_refusal_comes_before_the_body(server: RunningServer, backend: FakeBackend) -> None:
    """A client that waits for 100 Continue does not send 900 kB to a full queue."""
    backend.faults.queue_full = True
    head = b"POST /api/v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\nExpect: 100-continue\r\n\r\n"
    answer = server.exchange(head)
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"100 Continue" not in answer


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content-Type": "multipart/form-data; boundary=x"}, "E_HTTP_CONTENT_TYPE"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "E_HTTP_CONTENT_TYPE"),
        ({"Content-Type": "image/png", "Content-Encoding": "gzip"}, "E_HTTP_CONTENT_TYPE"),
        ({"Content-Type": "image/png", "Idempotency-Key": "x" * 201}, "E_HTTP_PARAMETER"),
        ({"Content-Type": "image/png", "Idempotency-Key": "\xe9".encode("latin-1")}, "E_HTTP_PARAMETER"),
    ],
)
def test_headers_of_other_content_are_refused(client: httpx.Client, headers: dict[str, str], code: str) -> None:
    answer = client.post("/api/v1/predict", content=PNG, headers=headers)
    assert answer.status_code in (400, 415)
    assert answer.json()["error"]["code"] == code


@pytest.mark.parametrize("query", ["wait=2", "wait=", "cam=yes", "nam=x", "wait=0&wait=1"])
def test_parameter_that_is_not_understood_is_refused(client: httpx.Client, query: str) -> None:
    answer = client.post(f"/api/v1/predict?{query}", content=PNG, headers=AS_PNG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "E_HTTP_PARAMETER")


def test_empty_body_is_refused(client: httpx.Client) -> None:
    answer = client.post("/api/v1/predict", content=b"", headers=AS_PNG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "E_HTTP_BODY_EMPTY")


def test_too_many_requests_are_refused_at_once_and_the_others_are_served(
    serve: ServerFactory, backend: FakeBackend
) -> None:
    server = serve(limits=replace(FAST, predictions=3))
    backend.delay = 0.3

    def post(_: int) -> tuple[int, float, str]:
        start = time.monotonic()
        answer = httpx.post(f"{server.url}/api/v1/predict", content=PNG, headers=AS_PNG, trust_env=False)
        return answer.status_code, time.monotonic() - start, answer.headers.get("retry-after", "")

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(post, range(12)))
    statuses = [status for status, _, _ in answers]
    assert statuses.count(200) >= 3
    assert statuses.count(429) >= 6
    assert set(statuses) == {200, 429}
    assert all(retry == "1" for status, _, retry in answers if status == 429)
    assert len(backend.accepted) == statuses.count(200)
    assert httpx.post(f"{server.url}/api/v1/predict", content=PNG, headers=AS_PNG, trust_env=False).status_code == 200


def test_body_that_is_cut_off_leaves_no_file(server: RunningServer, backend: FakeBackend) -> None:
    with server.connect() as connection:
        connection.sendall(b"POST /api/v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\nhalf")
        time.sleep(0.05)
    for _ in range(200):
        if server.seen:
            break
        time.sleep(0.01)
    assert server.seen == [("POST", "/api/v1/predict", 400)]
    until_empty(backend.incoming)
    assert backend.accepted == []


def test_disk_error_leaves_no_file(client: httpx.Client, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device", "/secret/Doe^Jane")

    with monkeypatch.context() as patch:
        patch.setattr("echoquad_serve.http.routes.uploads.os.write", full)
        answer = client.post("/api/v1/predict", content=PNG, headers=AS_PNG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "E_STORAGE_FULL")
    assert "Doe" not in answer.text
    until_empty(backend.incoming)


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    one = b"POST /api/v1/predict?name=%d HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n%s\r\nABCD"
    data = one % (1, b"") + one % (2, b"") + one % (3, b"Connection: close\r\n")
    with server.connect() as connection:
        connection.sendall(data)
        answers = read_all(connection)
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert answers.index(b'"name":"1"') < answers.index(b'"name":"2"') < answers.index(b'"name":"3"')


# Names


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("a.png", "a.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\exams\\a.dcm", "a.dcm"),
        ("a\r\nb\x00\u202ec.png", "abc.png"),
        ("Übersicht 4K.png", "Übersicht 4K.png"),
        ("x" * 300 + ".png", "x" * 96 + ".png"),
        (" a.png ", "a.png"),
    ],
)
def test_name_is_printable_and_no_path(wanted: str, name: str) -> None:
    assert file_name(wanted, b"") == name


@pytest.mark.parametrize(
    ("head", "extension"),
    [
        (PNG, ".png"),
        (b"\xff\xd8\xff\xe0", ".jpg"),
        (bytes(128) + b"DICM", ".dcm"),
        (b"\x00\x00\x00\x18ftypmp42", ".mp4"),
        (b"RIFF1234AVI ", ".avi"),
        (b"RIFF1234WEBP", ""),
        (b"\x1aE\xdf\xa3", ".mkv"),
        (b"II*\x00", ".tif"),
        (b"IInoise", ""),
        (b"", ""),
    ],
)
@pytest.mark.parametrize("wanted", ["", "..", "/", "\n"])
def test_object_without_a_name_gets_one_by_its_content(head: bytes, extension: str, wanted: str) -> None:
    name = file_name(wanted, head)
    assert name.startswith("upload-")
    assert len(name) == len("upload-") + 8 + len(extension)
    assert name.endswith(extension)


@given(st.text(max_size=200), st.binary(max_size=140))
def test_no_name_reaches_the_path_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, wanted: str, body: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "uploads"
    folder.mkdir(exist_ok=True)
    upload = Upload(folder, wanted)
    upload.add(body)
    path = upload.finish()
    assert path.parent == folder
    assert path.read_bytes() == body
    assert len(path.stem) == 32
    assert 0 < len(upload.name) <= 100
    assert upload.name.isprintable()
    assert not set(upload.name) & set("/\\")
    upload.discard()
    assert list(folder.iterdir()) == []


def test_nothing_is_written_after_the_request_has_ended(tmp_path: Path) -> None:
    upload = Upload(tmp_path, "a.png")
    upload.add(PNG)
    upload.write()
    upload.discard()
    upload.add(PNG)
    with pytest.raises(StorageFullError):
        upload.write()
    upload.discard()
    assert list(tmp_path.iterdir()) == []
