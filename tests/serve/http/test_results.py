"""``/api/v1/results``: pages in both directions, one result, and its picture."""

from __future__ import annotations

import httpx
import pytest

from .fake_backend import FakeBackend


def pages(client: httpx.Client, direction: str, limit: int) -> list[int]:
    """Return the numbers of all results, page by page."""
    numbers: list[int] = []
    parameters: dict[str, int] = {"limit": limit} | ({"after": 0} if direction == "after" else {})
    for _ in range(50):
        page = client.get("/api/v1/results", params=parameters).json()
        numbers += [one["number"] for one in page["results"]]
        if page["next"] is None:
            return numbers
        parameters[direction] = page["next"]
    raise AssertionError("the pages do not end")


@pytest.mark.parametrize("limit", [1, 2, 5, 500])
def test_pages_show_every_result_once(client: httpx.Client, limit: int) -> None:
    assert pages(client, "before", limit) == [5, 4, 3, 2, 1]
    assert pages(client, "after", limit) == [1, 2, 3, 4, 5]


def test_latest_results_come_first_by_default(client: httpx.Client, backend: FakeBackend) -> None:
    for _ in range(200):
        backend.invent_result("x.png")
    page = client.get("/api/v1/results").json()
    assert [one["number"] for one in page["results"]] == list(range(205, 105, -1))
    assert page["next"] == 106


def test_both_limits_are_a_range(client: httpx.Client) -> None:
    page = client.get("/api/v1/results?after=1&before=4").json()
    assert [one["number"] for one in page["results"]] == [2, 3]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=501", "limit=1.5", "before=0", "after=-1", "before=9007199254740992", "limit=", "a=1"],
)
def test_invalid_page_is_refused(client: httpx.Client, query: str) -> None:
    answer = client.get(f"/api/v1/results?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "E_HTTP_PARAMETER")


def test_one_result_and_its_picture(client: httpx.Client) -> None:
    one = client.get("/api/v1/results?limit=1").json()["results"][0]
    path = f"/api/v1/results/{one['id']}"
    assert client.get(path).json() == one
    plain, coloured = client.get(f"{path}/overlay"), client.get(f"{path}/overlay?row=0&cam=1")
    assert plain.headers["content-type"] == coloured.headers["content-type"] == "image/png"
    assert plain.headers["cache-control"] == "no-store"  # a picture of a patient stays in no browser's cache
    assert plain.content != coloured.content


@pytest.mark.parametrize(
    "path", ["/api/v1/results/{}", "/api/v1/results/{}/overlay", "/api/v1/results/{}/overlay?row=7"]
)
@pytest.mark.parametrize("identifier", ["f" * 32, "F" * 32, "1.2.840", "..", "%2e%2e%2fetc", "x" * 3000])
def test_unknown_result_is_404(client: httpx.Client, path: str, identifier: str) -> None:
    answer = client.get(path.format(identifier))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] in ("E_RESULT_NOT_FOUND", "E_HTTP_NOT_FOUND")


def test_frame_that_is_not_kept_is_404_with_its_code(client: httpx.Client, backend: FakeBackend) -> None:
    backend.faults.frames_gone = True
    one = client.get("/api/v1/results?limit=1").json()["results"][0]
    answer = client.get(f"/api/v1/results/{one['id']}/overlay")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "E_FRAME_UNREADABLE")
    assert client.get(f"/api/v1/results/{one['id']}/overlay?row=1").json()["error"]["code"] == "E_RESULT_NOT_FOUND"


def test_answer_shows_no_sender_and_no_uid(client: httpx.Client, backend: FakeBackend) -> None:
    from dataclasses import replace

    secret = replace(
        backend.results(limit=1)[0], id="a" * 32, sender="10.1.2.3", sop_instance_uid="1.2.3.4", sop_class_uid="1.2.5"
    )
    backend._by_id[secret.id] = secret
    text = client.get(f"/api/v1/results/{secret.id}").text
    assert not {"10.1.2.3", "1.2.3.4", "1.2.5"} & set(text.split('"'))
