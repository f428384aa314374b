"""The outbox with the real store: failures, refusals, restarts, and a folder on a share that hangs and breaks."""

from __future__ import annotations

import csv
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_serve.config import DestinationConfig, StoreConfig
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError
from echoquad_serve.outbox import delivery_worker
from echoquad_serve.outbox.folder_destination import FolderDestination
from echoquad_serve.outbox.outbox import Outbox
from echoquad_serve.queue import JobStore
from echoquad_serve.records import Delivery, IncomingObject, Result


class Flaky:
    name = "flaky"

    def __init__(self) -> None:
        self.got: list[str] = []
        self.answers: dict[str, list[Exception]] = {}

    def deliver(self, delivery: Delivery) -> None:
        assert delivery.source is not None and delivery.source.read_bytes() == b"pixels"
        if answers := self.answers.get(delivery.result.name):
            raise answers.pop(0)
        self.got.append(delivery.result.name)

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_worker, "_FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(delivery_worker, "_LONGEST_WAIT_S", 0.3)


@pytest.fixture
def add(make_row: Callable[..., Any]) -> Callable[[JobStore, str], Result]:
    def add_(store: JobStore, name: str) -> Result:
        path = store.incoming / "offered.png"
        path.write_bytes(b"pixels")
        store.accept(IncomingObject(path, "http", name))
        (job,) = store.take(1, 5)
        return store.finish(Result(job.id, "done", "http", name, job.received, 1_795_740_000.0, rows=(make_row(name),)))

    return add_


def wait_until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition has not come true"
        time.sleep(0.01)


def open_store(tmp_path: Path) -> JobStore:
    return JobStore(StoreConfig(folder=tmp_path / "store", min_free_mb=0), ["flaky", "files"])


def test_failures_refusals_and_a_restart(tmp_path: Path, add: Callable[[JobStore, str], Result]) -> None:
    flaky = Flaky()
    flaky.answers = {
        "1.png": [DeliveryError("away"), ValueError(), DeliveryError("away")],
        "2.png": [DeliveryRefusedError("not wanted"), DeliveryRefusedError("still not")],
        "3.png": [DeliveryError("busy", retry_after=0.3)],
    }
    config = DestinationConfig("flaky", "webhook")
    files = DestinationConfig("files", "folder", path=tmp_path / "out")
    store = open_store(tmp_path)
    outbox = Outbox(store, [(config, flaky), (files, FolderDestination(files))])
    outbox.start()
    for number in range(6):
        add(store, f"{number}.png")
    wait_until(lambda: flaky.got == ["0.png", "1.png", "3.png", "4.png", "5.png"])
    wait_until(lambda: all(state["waiting"] == 0 for state in outbox.status()))
    state, other = outbox.status()
    assert (state["refused"], state["last_error"], state["ok"]) == (1, "not wanted", False) and other["ok"]
    outbox.close()
    store.close()

    store = open_store(tmp_path)  # a refused result outlasts a restart
    outbox = Outbox(store, [(config, flaky), (files, FolderDestination(files))])
    outbox.start()
    time.sleep(0.3)
    assert outbox.status()[0]["refused"] == 1 and len(flaky.got) == 5
    assert outbox.retry_refused("flaky") == 1
    wait_until(lambda: outbox.status()[0]["last_error"] == "still not")
    assert outbox.retry_refused("flaky") == 1
    wait_until(lambda: flaky.got[-1] == "2.png")
    wait_until(lambda: outbox.status()[0]["ok"] and outbox.status()[0]["last_error"] is None)
    outbox.close()
    store.close()
    with (tmp_path / "out" / "2026-11-27.csv").open(newline="") as stream:
        assert [row["file"] for row in csv.DictReader(stream)] == [f"{number}.png" for number in range(6)]


def test_a_store_that_is_closed_first_ends_quietly(
    tmp_path: Path, add: Callable[[JobStore, str], Result], caplog: pytest.LogCaptureFixture
) -> None:
    """An attempt that outlasts the outbox finds the store closed; the next start delivers it again."""
    go_on, began = threading.Event(), threading.Event()

    class Slow(Flaky):
        def deliver(self, delivery: Delivery) -> None:
            began.set()
            go_on.wait(20)

    store = open_store(tmp_path)
    outbox = Outbox(store, [(DestinationConfig("flaky", "webhook"), Slow())])
    outbox.start()
    add(store, "a.png")
    assert began.wait(5)
    outbox.close()
    store.close()
    go_on.set()
    wait_until(lambda: not any(thread.name == "echoquad-outbox-flaky" for thread in threading.enumerate()))
    assert not caplog.records
    store = open_store(tmp_path)
    assert len(store.due("flaky", time.time(), 5)) == 1
    store.close()


def test_a_folder_on_a_share_that_hangs_and_breaks(
    tmp_path: Path, add: Callable[[JobStore, str], Result], share: Any
) -> None:
    files = DestinationConfig("files", "folder", path=share.mount / "out", timeout_s=0.2)
    flaky, store = Flaky(), open_store(tmp_path)
    outbox = Outbox(store, [(DestinationConfig("flaky", "webhook"), flaky), (files, FolderDestination(files))])
    outbox.start()
    add(store, "0.png")
    wait_until(lambda: store.status()["destinations"]["files"]["waiting"] == 0)

    share.hang()
    add(store, "1.png")
    wait_until(lambda: len(flaky.got) == 2)  # the other goes on
    wait_until(lambda: not outbox.status()[1]["ok"])
    share.go_on()
    wait_until(lambda: store.status()["destinations"]["files"]["waiting"] == 0 and outbox.status()[1]["ok"])

    share.disconnect()
    add(store, "2.png")
    wait_until(lambda: outbox.status()[1]["last_error"] and not outbox.status()[1]["ok"])
    share.reconnect()
    wait_until(lambda: store.status()["destinations"]["files"]["waiting"] == 0 and outbox.status()[1]["ok"])

    share.hang()
    add(store, "3.png")
    wait_until(lambda: not outbox.status()[1]["ok"])
    began = time.monotonic()
    outbox.close()
    assert time.monotonic() - began < 2.0
    share.go_on()
    wait_until(lambda: not any(thread.name == "echoquad-outbox-files" for thread in threading.enumerate()))
    outbox = Outbox(store, [(files, FolderDestination(files))])  # as after a restart
    outbox.start()
    wait_until(lambda: store.status()["destinations"]["files"]["waiting"] == 0)
    outbox.close()
    store.close()
    with (share.server / "out" / "2026-11-27.csv").open(newline="") as stream:
        assert [row["file"] for row in csv.DictReader(stream)] == [f"{number}.png" for number in range(4)]
