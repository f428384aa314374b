"""The outbox: order, back-off, destinations that hang or fail in every way, and threads that end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.errors import FrameReadError, OutputError
from echoquad_serve.config import DestinationConfig
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError
from echoquad_serve.outbox import delivery_worker
from echoquad_serve.outbox.delivery_worker import back_off
from echoquad_serve.outbox.dicom_destination import DicomDestination
from echoquad_serve.outbox.outbox import Outbox
from echoquad_serve.records import Delivery, Result
from echoquad_serve.reports.report import Report, Reports

MakeResult = Callable[..., Result]


class Recorder:
    """A destination that records what it gets, and fails as `fail` says."""

    def __init__(self, name: str, fail: Callable[[Delivery], None] = lambda _: None) -> None:
        self.name = name
        self.fail = fail
        self.tried: list[str] = []
        self.got: list[str] = []
        self.closed = threading.Event()

    def deliver(self, delivery: Delivery) -> None:
        self.tried.append(delivery.result.id)
        self.fail(delivery)
        self.got.append(delivery.result.id)

    def close(self) -> None:
        self.closed.set()


def config(name: str, **values: Any) -> DestinationConfig:
    return DestinationConfig(name, "webhook", **values)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the back-off to a hundredth."""
    monkeypatch.setattr(delivery_worker, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(delivery_worker, "_LONGEST_WAIT_S", 0.1)


@pytest.fixture
def run() -> Iterator[Callable[..., Outbox]]:
    outboxes = []

    def run_(store: Any, *destinations: Recorder, **values: Any) -> Outbox:
        pairs = [
            (config(destination.name, **values.pop(destination.name, {})), destination) for destination in destinations
        ]
        outboxes.append(Outbox(store, pairs, **values))
        outboxes[-1].start()
        return outboxes[-1]

    yield run_
    for outbox in outboxes:
        outbox.close()
    for _ in range(100):
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("echoquad-outbox")]
        if not left:
            return
        time.sleep(0.02)
    pytest.fail(f"threads are left: {left}")


def test_each_destination_gets_each_result_in_order(make_store: Any, make_result: MakeResult, run: Any) -> None:
    store = make_store("a", "b")
    results = [make_result() for _ in range(50)]
    for result in results:
        store.add(result)
    a, b = Recorder("a"), Recorder("b")
    outcomes: list[tuple[str, str, Exception | None]] = []
    outbox = run(store, a, b, on_outcome=lambda *values: outcomes.append((values[0], values[1].result.id, values[2])))
    store.wait_until(lambda: not store.entries["a"] and not store.entries["b"])
    assert a.got == b.got == [result.id for result in results]
    assert sorted(outcomes) == sorted((name, result.id, None) for name in "ab" for result in results)
    assert [(state["name"], state["ok"], state["waiting"]) for state in outbox.status()] == [
        ("a", True, 0),
        ("b", True, 0),
    ]


def test_a_new_result_is_delivered_at_once(make_store: Any, make_result: MakeResult, run: Any) -> None:
    store = make_store("a")
    run(store, Recorder("a"))
    time.sleep(0.2)
    began = time.monotonic()
    store.add(make_result())
    store.wait_until(lambda: not store.entries["a"])
    assert time.monotonic() - began < 0.5


def test_one_that_hangs_holds_no_other_up_and_close_does_not_wait_for_it(
    make_store: Any, make_result: MakeResult, run: Any
) -> None:
    store, go_on = make_store("hangs", "works"), threading.Event()
    hangs, works = Recorder("hangs", lambda _: bool(go_on.wait(20)) and None), Recorder("works")
    outbox = run(store, hangs, works, hangs={"timeout_s": -1.0})
    for _ in range(20):
        store.add(make_result())
    store.wait_until(lambda: not store.entries["works"] and hangs.tried)
    assert len(hangs.tried) == 1
    state, other = outbox.status()
    assert not state["ok"] and "not answered" in state["last_error"] and state["waiting"] == 20 and other["ok"]
    began = time.monotonic()
    outbox.close()
    assert time.monotonic() - began < 2 and works.closed.is_set() and hangs.closed.is_set()
    go_on.set()


def test_close_does_not_wait_for_a_close_that_hangs(make_store: Any, run: Any) -> None:
    recorder, go_on = Recorder("a"), threading.Event()
    recorder.close = lambda: bool(go_on.wait(20)) and None  # type: ignore[method-assign]
    outbox = run(make_store("a"), recorder)
    began = time.monotonic()
    outbox.close()
    assert time.monotonic() - began < 2
    go_on.set()


@pytest.mark.usefixtures("quick")
def test_a_destination_that_is_away_gets_everything_in_order_once_it_is_back(
    make_store: Any, make_result: MakeResult, run: Any
) -> None:
    store, results, away = make_store("a"), [make_result() for _ in range(10)], [3]

    def fail(_: Delivery) -> None:
        if away[0]:
            away[0] -= 1
            raise DeliveryError("away")

    for result in results:
        store.add(result)
    recorder = Recorder("a", fail)
    run(store, recorder)
    store.wait_until(lambda: not store.entries["a"])
    assert recorder.got == [result.id for result in results]
    assert recorder.tried[:4] == [results[0].id] * 4  # nothing else was tried meanwhile


@pytest.mark.usefixtures("quick")
def test_a_result_that_always_fails_does_not_hold_up_the_others(
    make_store: Any, make_result: MakeResult, run: Any
) -> None:
    store, results = make_store("a"), [make_result() for _ in range(30)]

    def fail(delivery: Delivery) -> None:
        if delivery.result.id == results[3].id:
            raise DeliveryError("the server fails on this one")

    for result in results:
        store.add(result)
    recorder = Recorder("a", fail)
    outbox = run(store, recorder)
    store.wait_until(lambda: len(store.entries["a"]) == 1)
    assert recorder.got == [result.id for result in results if result is not results[3]]
    assert store.entries["a"][results[3].id].attempts >= 5
    (state,) = outbox.status()
    assert state["waiting"] == 1 and state["last_error"] == "the server fails on this one"


def test_a_refused_result_is_kept_reported_and_sent_again_on_demand(
    make_store: Any, make_result: MakeResult, run: Any
) -> None:
    store, results, refuse = make_store("a"), [make_result() for _ in range(3)], [True]

    def fail(delivery: Delivery) -> None:
        if refuse[0] and delivery.result.id == results[1].id:
            raise DeliveryRefusedError("no such\npatient")

    errors: list[Exception] = []
    recorder = Recorder("a", fail)
    outbox = run(store, recorder, on_outcome=lambda _, __, error: errors.append(error) if error else None)
    for result in results:
        store.add(result)
    store.wait_until(lambda: len(recorder.got) == 2 and store.entries["a"])
    (state,) = outbox.status()
    assert (state["refused"], state["waiting"], state["ok"]) == (1, 0, False)
    assert state["last_error"] == "no such patient" and [type(error) for error in errors] == [DeliveryRefusedError]
    refuse[0] = False
    assert outbox.retry_refused("a") == 1
    store.wait_until(lambda: not store.entries["a"])
    assert outbox.status()[0]["ok"]
    with pytest.raises(KeyError):
        outbox.retry_refused("unknown")


def test_sending_again_does_not_wait_for_the_back_off(make_store: Any, make_result: MakeResult, run: Any) -> None:
    store, away = make_store("a"), [True]

    def fail(_: Delivery) -> None:
        if away[0]:
            raise DeliveryError("away", retry_after=600.0)

    outbox = run(store, Recorder("a", fail))
    store.add(make_result())
    store.wait_until(lambda: any(entry.attempts for entry in store.entries["a"].values()))
    (entry,) = store.entries["a"].values()
    assert 590 < entry.retry_at - time.time() < 610  # what the destination asks for
    away[0] = False
    time.sleep(0.1)
    assert outbox.retry_refused("a") == 1
    store.wait_until(lambda: not store.entries["a"], 2)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "raised",
    [ValueError("NAME^PATIENT"), MemoryError(), SystemExit("NAME^PATIENT"), OutputError("disk full"), TypeError()],
)
def test_the_thread_survives_whatever_a_destination_raises(
    make_store: Any, make_result: MakeResult, run: Any, raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    store, left = make_store("a"), [2]

    def fail(_: Delivery) -> None:
        if left[0]:
            left[0] -= 1
            raise raised

    caplog.set_level(logging.DEBUG)
    outbox = run(store, Recorder("a", fail))
    result = make_result()
    store.add(result)
    store.wait_until(lambda: not store.entries["a"])
    assert outbox.status()[0]["faults"] == 2
    assert "NAME^PATIENT" not in caplog.text and type(raised).__name__ in caplog.text


@pytest.mark.usefixtures("quick")
def test_the_thread_survives_the_store_and_the_observer(make_store: Any, make_result: MakeResult, run: Any) -> None:
    store = make_store("a")
    store.fail = OSError("disk full")

    def observe(*_: Any) -> None:
        raise ValueError

    recorder = Recorder("a")
    outbox = run(store, recorder, on_outcome=observe)
    store.add(make_result())
    store.wait_until(lambda: outbox.status()[0]["faults"] >= 2)
    assert not outbox.status()[0]["ok"]
    store.fail = None
    store.wait_until(lambda: not store.entries["a"])
    store.wait_until(lambda: outbox.status()[0]["ok"])
    assert len(recorder.got) == 1


def test_results_of_other_origins_are_not_sent(make_store: Any, make_result: MakeResult, run: Any) -> None:
    store, recorder = make_store("a"), Recorder("a")
    outcomes: list[str] = []
    wanted = make_result(origin="dicom")
    for result in (make_result(), make_result(origin="live"), wanted, make_result(origin="folder")):
        store.add(result)
    run(
        store,
        recorder,
        a={"origins": ("dicom",)},
        on_outcome=lambda _, delivery, __: outcomes.append(delivery.result.id),
    )
    store.wait_until(lambda: not store.entries["a"])
    assert recorder.tried == outcomes == [wanted.id]


def test_what_close_cuts_off_stays_due(make_store: Any, make_result: MakeResult, run: Any) -> None:
    store, go_on = make_store("a"), threading.Event()

    def fail(_: Delivery) -> None:
        go_on.wait(20)
        raise DeliveryError("cut off")

    recorder = Recorder("a", fail)
    recorder.close = go_on.set  # type: ignore[method-assign]
    outbox = run(store, recorder)
    store.add(make_result())
    store.wait_until(lambda: bool(recorder.tried))
    outbox.close()
    (entry,) = store.entries["a"].values()
    assert (entry.attempts, entry.retry_at) == (0, 0.0)


def test_back_off_doubles_from_a_second_to_five_minutes_with_jitter() -> None:
    for failures in range(1, 200):
        waits = [back_off(failures) for _ in range(50)]
        longest = min(300.0, 2.0**failures)
        assert all(max(1.0, longest / 2) <= wait <= longest for wait in waits) and len(set(waits)) > 40


def test_an_idle_outbox_uses_no_processor_time(make_store: Any, run: Any) -> None:
    run(make_store("a", "b", "c"), Recorder("a"), Recorder("b"), Recorder("c"))
    began = time.process_time()
    time.sleep(1.5)
    assert time.process_time() - began < 0.1


# The DICOM destination


def reports(*data: bytes, reason: str = "") -> Reports:
    return Reports(tuple(Report("1.2", "1.3", "1.4", "1.5", one) for one in data), reason)


def dicom(build: Callable[[Delivery], Any], sent: list[Any]) -> DicomDestination:
    return DicomDestination(DestinationConfig("pacs", "dicom"), build, sent.append)


def test_dicom_builds_and_sends(tmp_path: Path, make_result: MakeResult) -> None:
    source, sent = tmp_path / "object", []  # type: ignore[var-annotated]
    source.write_bytes(b"")
    destination = dicom(lambda delivery: reports(delivery.result.id.encode(), reason="no structured report"), sent)
    delivery = Delivery(make_result(origin="dicom"), source)
    destination.deliver(delivery)
    assert sent == [[delivery.result.id.encode()]] and destination.name == "pacs"
    assert destination.note == "no structured report"
    dicom(lambda _: reports(), sent).deliver(delivery)  # nothing to report
    dicom(lambda _: reports(b"x"), sent).deliver(Delivery(make_result(origin="live"), None))
    assert len(sent) == 1


@pytest.mark.parametrize("gone", [None, Path("missing")])
def test_dicom_refuses_a_result_whose_object_is_gone(make_result: MakeResult, gone: Path | None) -> None:
    with pytest.raises(DeliveryRefusedError, match="not kept"):
        dicom(lambda _: reports(b"x"), []).deliver(Delivery(make_result(origin="dicom"), gone))


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OutputError("disk"), DeliveryError),
        (FrameReadError("read"), DeliveryError),
        (DeliveryError("later"), DeliveryError),
        (DeliveryRefusedError("never"), DeliveryRefusedError),
        (ValueError("bug"), ValueError),
    ],
)
def test_dicom_classifies_errors_of_building(
    tmp_path: Path, make_result: MakeResult, raised: Exception, expected: type[Exception]
) -> None:
    def build(_: Delivery) -> Any:
        raise raised

    (tmp_path / "object").write_bytes(b"")
    with pytest.raises(expected) as caught:
        dicom(build, []).deliver(Delivery(make_result(origin="dicom"), tmp_path / "object"))
    assert type(caught.value) is expected
