"""Storage commitment of the node: requests, reports on either association, and what survives a restart."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pynetdicom")

from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt

from echoquad_serve.config import Caller
from echoquad_serve.dicom_network import DicomNode, StoreClient
from echoquad_serve.dicom_network.commitment.data_sets import decode_report, encode_request
from echoquad_serve.dicom_network.commitment.pending_reports import PendingReport, PendingReports
from echoquad_serve.dicom_network.sop_classes import COMMITMENT, COMMITMENT_INSTANCE

from ..conftest import ULTRASOUND, Queue, dicom_threads, free_port, make_object, wait_until

Start = Callable[..., DicomNode]


class Modality:
    """A caller that asks for commitment, and takes the report on the association of its request or on a port."""

    def __init__(self) -> None:
        self.entity = AE("CART")
        self.entity.add_requested_context(COMMITMENT)
        self.reports: list[tuple[int, str, set[str], dict[str, int]]] = []
        self.came = threading.Event()
        self.answer = 0x0000
        self.server: Any = None

    def on_report(self, event: Any) -> tuple[int, None]:
        if self.answer == 0x0000:
            self.reports.append((event.event_type, *decode_report(event.event_information)))
            self.came.set()
        return self.answer, None

    def listen(self, port: int) -> None:
        entity = AE("CART")
        entity.add_supported_context(COMMITMENT, scu_role=True, scp_role=True)
        handlers = [(evt.EVT_N_EVENT_REPORT, self.on_report)]
        self.server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)

    def associate(self, node: DicomNode) -> Any:
        handlers = [(evt.EVT_N_EVENT_REPORT, self.on_report)]
        association = self.entity.associate("127.0.0.1", node.port, ae_title="ECHOQUAD", evt_handlers=handlers)
        assert association.is_established
        return association

    def close(self) -> None:
        if self.server is not None:
            self.server.shutdown()


@pytest.fixture
def modality() -> Iterator[Modality]:
    one = Modality()
    yield one
    one.close()


def request(association: Any, *instances: str) -> tuple[int, str]:
    """Ask for commitment; return the status and the transaction UID."""
    transaction = str(generate_uid())
    data = encode_request(transaction, [(ULTRASOUND, instance) for instance in instances])
    status, _ = association.send_n_action(data, 1, COMMITMENT, COMMITMENT_INSTANCE)
    return status.Status, transaction


def keep(queue: Queue, node: DicomNode, path: Path) -> str:
    """Return the UID of an object that the node has stored."""
    sent = make_object(path)
    StoreClient("127.0.0.1", node.port, "ECHOQUAD", "CART", timeout_s=5.0).send([path])
    return str(sent.SOPInstanceUID)


def test_report_comes_on_the_association_of_the_request(
    start_node: Start, queue: Queue, modality: Modality, tmp_path: Path
) -> None:
    node = start_node()
    kept = keep(queue, node, tmp_path / "a.dcm")
    association = modality.associate(node)
    status, transaction = request(association, kept)
    assert status == 0x0000
    assert modality.came.wait(5.0)
    assert modality.reports == [(1, transaction, {kept}, {})]
    modality.came.clear()
    status, transaction = request(association, kept, "1.2.3", "1.2.4")
    assert modality.came.wait(5.0)
    assert modality.reports[1:] == [(2, transaction, {kept}, {"1.2.3": 0x0112, "1.2.4": 0x0112})]
    association.release()
    assert association.is_released
    wait_until(lambda: node.status()["pending_reports"] == 0)


def test_report_comes_on_a_new_association_if_the_callers_port_is_known(
    start_node: Start, queue: Queue, modality: Modality, tmp_path: Path
) -> None:
    port = free_port()
    modality.listen(port)
    node = start_node(caller=(Caller("CART", "127.0.0.1", port),))
    kept = keep(queue, node, tmp_path / "a.dcm")
    association = modality.associate(node)
    assert request(association, kept)[0] == 0x0000
    association.release()
    assert modality.came.wait(5.0)
    assert modality.reports[0][2] == {kept}
    wait_until(lambda: list((tmp_path / "state").iterdir()) == [])


def test_report_of_a_caller_that_is_off_is_sent_after_a_restart(
    start_node: Start, queue: Queue, modality: Modality, tmp_path: Path
) -> None:
    port = free_port()
    callers = (Caller("CART", "127.0.0.1", port),)
    node = start_node(caller=callers)
    association = modality.associate(node)
    _, transaction = request(association, "1.2.3")
    association.release()
    (file,) = (tmp_path / "state").iterdir()
    assert json.loads(file.read_text())["transaction_uid"] == transaction
    wait_until(lambda: node._commitment is not None and node._commitment.attempts > 0)
    node.close()
    assert file.exists()
    modality.listen(port)
    start_node(caller=callers)
    assert modality.came.wait(5.0)
    assert modality.reports == [(2, transaction, set(), {"1.2.3": 0x0112})]
    wait_until(lambda: not file.exists())


def test_report_that_the_caller_refuses_stays(start_node: Start, modality: Modality, tmp_path: Path) -> None:
    port = free_port()
    modality.answer = 0x0110
    modality.listen(port)
    node = start_node(caller=(Caller("CART", "127.0.0.1", port),))
    association = modality.associate(node)
    request(association, "1.2.3")
    association.release()
    wait_until(lambda: node._commitment is not None and node._commitment.attempts > 0)
    assert node.status()["pending_reports"] == 1


def test_caller_that_neither_stays_nor_has_a_port_gets_no_report(
    start_node: Start, modality: Modality, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = start_node()
    association = modality.associate(node)
    request(association, "1.2.3")
    association.abort()
    wait_until(lambda: node.status()["pending_reports"] == 0)
    assert "set its port" in caplog.text and "1.2.3" not in caplog.text
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.parametrize("wait", [0.0, 0.1, 0.2])
def test_caller_that_releases_at_any_moment_is_not_kept_waiting(
    start_node: Start, modality: Modality, wait: float
) -> None:
    node = start_node()
    association = modality.associate(node)
    assert request(association, "1.2.3")[0] == 0x0000
    time.sleep(wait)
    # pynetdicom 3.0.4 waits for its time limit, or without one, if the node leaves at this moment: that is not the node
    # that is slow.
    association.acse_timeout = 2.0
    watchdog = threading.Timer(4.0, association.kill)
    watchdog.start()
    begin = time.monotonic()
    association.release()
    watchdog.cancel()
    assert time.monotonic() - begin < 5.0
    wait_until(lambda: node.status()["associations"] == 0 and node.status()["pending_reports"] == 0)
    modality.associate(node).release()


def test_requests_that_are_none(start_node: Start, modality: Modality, tmp_path: Path) -> None:
    node = start_node()
    association = modality.associate(node)

    def status(data: Dataset, action: int = 1, instance: str = COMMITMENT_INSTANCE) -> int:
        return int(association.send_n_action(data, action, COMMITMENT, instance)[0].Status)

    right = encode_request("1.2", [(ULTRASOUND, "1.2.3")])
    assert status(right, action=2) == 0x0123
    assert status(right, instance="1.2.3") == 0x0123
    assert status(encode_request("1.2", [])) == 0x0115
    assert status(encode_request("1.2", [(ULTRASOUND, "../x")])) == 0x0115
    assert status(encode_request("", [(ULTRASOUND, "1.2.3")])) == 0x0115
    assert list((tmp_path / "state").iterdir()) == []
    association.release()


def test_too_many_requests_are_refused(start_node: Start, modality: Modality, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echoquad_serve.dicom_network.commitment.provider._MAX_PENDING", 3)
    node = start_node(caller=(Caller("CART", "127.0.0.1", free_port()),))
    association = modality.associate(node)
    assert [request(association, "1.2.3")[0] for _ in range(4)] == [0, 0, 0, 0x0213]
    association.release()


def test_disk_that_is_full_is_no_success(
    start_node: Start, modality: Modality, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from echoquad_runtime.errors import OutputError

    def fail(path: Path, value: Any) -> None:
        raise OutputError("full")

    node = start_node()
    association = modality.associate(node)
    monkeypatch.setattr("echoquad_serve.dicom_network.commitment.pending_reports.write_json", fail)
    assert request(association, "1.2.3")[0] == 0x0110
    association.release()


def test_node_without_commitment_takes_no_request(queue: Queue, modality: Modality) -> None:
    from ..conftest import BASE

    node = DicomNode(BASE, queue.accept, queue.incoming, queue.check_room)
    node.start()
    try:
        association = modality.associate(node)
        assert request(association, "1.2.3")[0] == 0x0110
        association.release()
    finally:
        node.close()
    assert not [name for name in dicom_threads() if "commitment" in name]


def test_damaged_and_old_files_are_removed(tmp_path: Path) -> None:
    pending = PendingReports(tmp_path / "state")
    good = PendingReport("CART", "127.0.0.1", 104, "1.2", ((ULTRASOUND, "1.2.3"),))
    old = PendingReport("CART", "127.0.0.1", 104, "1.2", (), created=time.time() - 8 * 86400)
    for report in (good, old):
        pending.add(report)
    for index, text in enumerate(["", "{", "[]", "{}", '{"instances": 3}', json.dumps({"instances": [["a"]]})]):
        (tmp_path / "state" / f"{index}.json").write_text(text)
    assert pending.load() == [good]
    assert [path.stem for path in (tmp_path / "state").iterdir()] == [good.id]
