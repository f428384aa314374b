"""Reports that archives send, and the client that waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pynetdicom")

from hypothesis import given
from hypothesis import strategies as st
from pynetdicom import AE, build_role, evt

from echoquad_serve.config import Caller
from echoquad_serve.dicom_network import CommitmentReports, DicomNode, StoreClient
from echoquad_serve.dicom_network.commitment.data_sets import (
    decode_report,
    decode_request,
    encode_report,
    encode_request,
)
from echoquad_serve.dicom_network.commitment.reports import Report
from echoquad_serve.dicom_network.sop_classes import COMMITMENT, COMMITMENT_INSTANCE
from echoquad_serve.errors import DeliveryError

from ..conftest import ULTRASOUND, make_object

Start = Callable[..., DicomNode]
UIDS = st.from_regex(r"[1-9][0-9]{0,5}(\.[1-9][0-9]{0,5}){1,6}", fullmatch=True)


class Archive:
    """An archive that reports on the association of the request, on a new one, or never."""

    def __init__(self) -> None:
        self.entity = AE("PACS")
        self.entity.add_supported_context(ULTRASOUND)
        self.entity.add_supported_context(COMMITMENT)
        self.how = "same"
        self.node_port = 0
        self.failures: dict[str, int] = {}
        self.action_status = 0x0000
        self.stores = 0
        self.delay = 0.1
        self._threads: list[threading.Thread] = []
        handlers = [(evt.EVT_C_STORE, self._on_store), (evt.EVT_N_ACTION, self._on_action)]
        self.server = self.entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.port = int(self.server.server_address[1])

    def _on_store(self, event: Any) -> int:
        self.stores += 1
        return 0x0000

    def _on_action(self, event: Any) -> tuple[int, None]:
        transaction, instances = decode_request(event.action_information)
        if self.how != "never" and self.action_status == 0:
            thread = threading.Thread(target=self._report, args=(event.assoc, transaction, instances))
            self._threads.append(thread)
            thread.start()
        return self.action_status, None

    def _report(self, association: Any, transaction: str, instances: Any) -> None:
        time.sleep(self.delay)
        information = encode_report(transaction, instances, self.failures)
        if self.how == "same":
            kind = 2 if self.failures else 1
            association.send_n_event_report(information, kind, COMMITMENT, COMMITMENT_INSTANCE)
            return
        entity = AE("PACS")
        entity.add_requested_context(COMMITMENT)
        role = build_role(COMMITMENT, scp_role=True)
        new = entity.associate("127.0.0.1", self.node_port, ae_title="ECHOQUAD", ext_neg=[role])
        if new.is_established:
            new.send_n_event_report(information, 2 if self.failures else 1, COMMITMENT, COMMITMENT_INSTANCE)
            new.release()

    def close(self) -> None:
        for thread in self._threads:
            thread.join(5.0)
        self.server.shutdown()


@pytest.fixture
def archive() -> Iterator[Archive]:
    one = Archive()
    yield one
    one.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    make_object(tmp_path / "a.dcm", size=8)
    return tmp_path / "a.dcm"


def client(archive: Archive, reports: CommitmentReports | None = None, timeout: float = 4.0) -> StoreClient:
    return StoreClient("127.0.0.1", archive.port, "PACS", timeout_s=timeout, commitment=True, reports=reports)


def test_report_on_the_association_of_the_request(archive: Archive, file: Path) -> None:
    client(archive).send([file])
    assert archive.stores == 1


def test_report_on_a_new_association_comes_through_the_node(start_node: Start, archive: Archive, file: Path) -> None:
    node = start_node(caller=(Caller("PACS"),))
    archive.how, archive.node_port = "new", node.port
    client(archive, node.reports).send([file])


def test_failed_object_is_tried_again(archive: Archive, file: Path) -> None:
    from pydicom import dcmread

    archive.failures = {str(dcmread(file).SOPInstanceUID): 0x0110}
    with pytest.raises(DeliveryError, match="does not commit 1 of 1 objects \\(0x0110\\)") as caught:
        client(archive).send([file])
    assert type(caught.value) is DeliveryError
    archive.failures = {}
    client(archive).send([file])


def test_no_report_is_no_delivery(archive: Archive, file: Path) -> None:
    archive.how = "never"
    begin = time.monotonic()
    with pytest.raises(DeliveryError, match="no report"):
        client(archive, timeout=1.0).send([file])
    assert time.monotonic() - begin < 2.0


def test_late_report_counts_at_the_next_attempt(start_node: Start, archive: Archive, file: Path) -> None:
    node = start_node(caller=(Caller("PACS"),))
    archive.how, archive.node_port, archive.delay = "new", node.port, 1.0
    with pytest.raises(DeliveryError, match="no report"):
        client(archive, node.reports, timeout=0.6).send([file])
    for thread in archive._threads:
        thread.join(5.0)
    archive.server.shutdown()
    archive.server = AE("X")  # nothing is sent any more
    client(archive, node.reports, timeout=0.6).send([file])


def test_archive_that_refuses_the_request(archive: Archive, file: Path) -> None:
    archive.action_status = 0x0213
    with pytest.raises(DeliveryError, match="0x0213"):
        client(archive).send([file])


def test_archive_without_commitment_is_named(archive: Archive, file: Path) -> None:
    archive.entity.remove_supported_context(COMMITMENT)
    archive.server.contexts = archive.entity.supported_contexts
    with pytest.raises(DeliveryError, match="commitment = false"):
        client(archive).send([file])


def test_forged_report_is_of_no_effect(start_node: Start) -> None:
    node = start_node()
    transaction = node.reports.open_transaction("PACS")
    entity = AE("PACS")
    entity.add_requested_context(COMMITMENT)
    association = entity.associate(
        "127.0.0.1", node.port, ae_title="ECHOQUAD", ext_neg=[build_role(COMMITMENT, scp_role=True)]
    )
    information = encode_report("1.2.3", [(ULTRASOUND, "1.2.3.4")], {})
    status, _ = association.send_n_event_report(information, 1, COMMITMENT, COMMITMENT_INSTANCE)
    assert status.Status == 0x0000
    del information.TransactionUID
    status, _ = association.send_n_event_report(information, 1, COMMITMENT, COMMITMENT_INSTANCE)
    assert status.Status == 0x0115
    association.release()
    assert not node.reports.are_committed("PACS", ["1.2.3.4"])
    assert node.reports.wait(transaction, 0.0) is None


def test_memory_of_transactions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echoquad_serve.dicom_network.commitment.reports._MAX_TRANSACTIONS", 5)
    reports = CommitmentReports()
    transactions = [reports.open_transaction("PACS") for _ in range(20)]
    assert [reports.receive(one, Report(frozenset({one}))) for one in transactions] == [False] * 15 + [True] * 5
    assert reports.are_committed("PACS", transactions[-5:]) and not reports.are_committed("PACS", transactions[:1])
    assert not reports.are_committed("OTHER", transactions[-1:])


@given(UIDS, st.dictionaries(UIDS, st.booleans(), min_size=1, max_size=8))
def test_data_sets_survive_encoding(transaction: str, instances: dict[str, bool]) -> None:
    pairs = [(ULTRASOUND, uid) for uid in instances]
    assert decode_request(encode_request(transaction, pairs)) == (transaction, pairs)
    failures = {uid: 0x0112 for uid, good in instances.items() if not good}
    decoded = decode_report(encode_report(transaction, pairs, failures))
    assert decoded == (transaction, {uid for uid, good in instances.items() if good}, failures)
