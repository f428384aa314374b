"""Clients that are silent, slow, too many, cut off or malicious: the node goes on, and nothing of them stays."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.sop_class import UltrasoundImageStorage, Verification

from echoquad_serve.dicom_network import DicomNode

from .conftest import ULTRASOUND, Queue, dicom_threads, echoscu, make_object, storescu, wait_until

Start = Callable[..., DicomNode]


def connect(node: DicomNode) -> socket.socket:
    return socket.create_connection(("127.0.0.1", node.port), timeout=5.0)


def closed(connection: socket.socket) -> bool:
    """Return whether the node closes a connection in time."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def test_fifty_silent_connections_keep_nobody_out(start_node: Start) -> None:
    node = start_node(max_associations=3, acse_timeout_s=30.0)
    scanners = [connect(node) for _ in range(50)]
    begin = time.monotonic()
    assert echoscu(node.port).returncode == 0
    assert time.monotonic() - begin < 2.0
    for scanner in scanners:
        scanner.close()


def test_silent_connection_is_closed(start_node: Start) -> None:
    node = start_node(acse_timeout_s=0.3)
    with connect(node) as connection:
        assert closed(connection)
    wait_until(lambda: not any("connection" in name for name in dicom_threads()))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\x00\x00\x00\x01\x00",  # a request of which only the header comes
        b"\x01\x00\xff\xff\xff\xff" + bytes(1000),  # a request of 4 GiB
        b"\x04\x00\x00\x00\x00\x06\x00\x00\x00\x02\x01\x03",  # data before an association
        b"\x01\x00\x00\x00\x00\x44" + bytes(68),
        os.urandom(4096),
    ],
    ids=["http", "half a header", "4 GiB", "data first", "empty request", "random"],
)
def test_connection_that_is_no_dicom_is_closed(start_node: Start, data: bytes) -> None:
    node = start_node(acse_timeout_s=0.5, network_timeout_s=0.7)
    with connect(node) as connection:
        connection.sendall(data)
        assert closed(connection)
    assert echoscu(node.port).returncode == 0


def test_scanner_that_speaks_and_leaves_keeps_no_thread(start_node: Start) -> None:
    node = start_node(acse_timeout_s=30.0)
    before = len(dicom_threads())
    for _ in range(60):
        with socket.create_connection(("127.0.0.1", node.port)) as connection:
            connection.sendall(b"\r\n")
    wait_until(lambda: len(dicom_threads()) == before)
    assert echoscu(node.port).returncode == 0


def test_request_that_drips_is_closed(start_node: Start) -> None:
    node = start_node(acse_timeout_s=0.5, network_timeout_s=0.7)
    begin = time.monotonic()
    with connect(node) as connection, pytest.raises(OSError):  # each byte comes in time, and the whole does not
        connection.sendall(b"\x01\x00\x00\x00\x20\x00")
        while time.monotonic() - begin < 10.0:
            connection.sendall(b"\x00")
            time.sleep(0.1)
    assert time.monotonic() - begin < 5.0


def test_one_association_too_many_is_rejected(start_node: Start) -> None:
    node = start_node(max_associations=2)
    entity = AE("CART")
    entity.add_requested_context(Verification)
    first = [entity.associate("127.0.0.1", node.port, ae_title="ECHOQUAD") for _ in range(2)]
    assert all(one.is_established for one in first)
    answer = echoscu(node.port)
    assert "Local Limit Exceeded" in answer.stderr + answer.stdout
    first[0].release()
    wait_until(lambda: node.status()["associations"] == 1)
    assert echoscu(node.port).returncode == 0
    first[1].abort()


def test_association_without_a_word_ends(start_node: Start) -> None:
    node = start_node(network_timeout_s=0.5)
    entity = AE("CART")
    entity.add_requested_context(Verification)
    association = entity.associate("127.0.0.1", node.port, ae_title="ECHOQUAD")
    assert association.is_established
    wait_until(lambda: node.status()["associations"] == 0)
    wait_until(lambda: not association.is_established)


def associate(node: DicomNode) -> Any:
    entity = AE("CART")
    entity.add_requested_context(UltrasoundImageStorage, "1.2.840.10008.1.2.1")
    entity.add_requested_context(Verification)
    association = entity.associate("127.0.0.1", node.port, ae_title="ECHOQUAD")
    assert association.is_established
    return association


def store_request(instance: str = "1.2.3", sop_class: str = ULTRASOUND) -> C_STORE:
    from io import BytesIO

    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = sop_class, instance
    request.DataSet = BytesIO(b"\x08\x00\x16\x00UI\x04\x001.2\x00" + bytes(200_000))
    return request


def parts(request: C_STORE, context: int = 1) -> list[P_DATA]:
    """Return a request as parts to send."""
    from pynetdicom.dimse_messages import C_STORE_RQ

    message = C_STORE_RQ()
    message.primitive_to_message(request)
    return list(message.encode_msg(context, 16000))


@pytest.mark.parametrize("how", ["cut", "abort"])
def test_cut_connection_leaves_no_file(start_node: Start, queue: Queue, how: str) -> None:
    node = start_node()
    association = associate(node)
    for part in parts(store_request())[:-3]:
        association.dul.send_pdu(part)
    wait_until(lambda: any(file.stat().st_size > 10_000 for file in queue.incoming.iterdir()))
    if how == "cut":
        association.dul.socket.socket.shutdown(socket.SHUT_RDWR)
    else:
        association.abort()
    wait_until(lambda: not list(queue.incoming.iterdir()))
    wait_until(lambda: node.status()["associations"] == 0)
    assert queue.objects == [] and echoscu(node.port).returncode == 0


def test_sender_that_stops_in_the_middle_is_cut_off(start_node: Start, queue: Queue) -> None:
    node = start_node(network_timeout_s=0.5)
    association = associate(node)
    for part in parts(store_request())[:-3]:
        association.dul.send_pdu(part)
    wait_until(lambda: node.status()["associations"] == 0)
    assert list(queue.incoming.iterdir()) == [] and queue.objects == []


def test_invalid_instance_uid_is_not_understood(start_node: Start, queue: Queue, tmp_path: Path) -> None:
    data = make_object(tmp_path / "a.dcm")
    association = associate(start_node())
    for uid in ("../../etc/passwd", "1.2.", "1.2.3 4", "a"):
        from pydicom.uid import UID

        data.SOPInstanceUID = UID(uid)
        assert association.send_c_store(data).Status == 0xC000
    association.release()
    assert queue.objects == [] and list(queue.incoming.iterdir()) == []


def test_class_of_another_context_is_a_mismatch(start_node: Start, queue: Queue) -> None:
    node = start_node()
    association = associate(node)
    association.dimse_timeout = 5
    other = store_request(sop_class="1.2.840.10008.5.1.4.1.1.7")
    association._reactor_checkpoint.clear()
    for part in parts(other):
        association.dul.send_pdu(part)
    _, answer = association.dimse.get_msg(block=True)
    assert answer.Status == 0xA900
    association._reactor_checkpoint.set()
    association.abort()
    wait_until(lambda: not list(queue.incoming.iterdir()))
    assert queue.objects == []


@pytest.mark.parametrize("attack", ["command", "data without command", "flood", "other context", "no store"])
def test_invalid_messages_end_the_association(start_node: Start, queue: Queue, attack: str) -> None:
    node = start_node()
    association = associate(node)
    send = association.dul.send_pdu
    if attack == "command":  # fragments of a command that has no end
        for _ in range(8):
            send(part(1, b"\x01" + bytes(15_000)))
    elif attack == "data without command":
        send(part(1, b"\x00" + bytes(1000)))
    elif attack == "flood":
        for _ in range(40):
            for one in parts(store_request()):
                send(one)
    elif attack == "other context":
        send(parts(store_request())[0])
        send(part(3, b"\x00" + bytes(1000)))
    else:  # a C-STORE of the verification class
        for one in parts(store_request(sop_class="1.2.840.10008.1.1"), context=3):
            send(one)
    wait_until(lambda: node.status()["associations"] == 0)
    wait_until(lambda: not list(queue.incoming.iterdir()))
    assert echoscu(node.port).returncode == 0


def part(context: int, data: bytes) -> P_DATA:
    made = P_DATA()
    made.presentation_data_value_list = [[context, data]]
    return made


def test_mutated_conversations_neither_end_the_node_nor_stay(start_node: Start, queue: Queue) -> None:
    import random

    node = start_node(max_associations=200, acse_timeout_s=0.5, network_timeout_s=0.5)
    rng = random.Random(5)
    conversation = association_request(ULTRASOUND) + b"".join(
        struct.pack(">BBII", 4, 0, len(data) + 5, len(data) + 1) + bytes([context]) + data
        for one in parts(store_request())
        for context, data in one.presentation_data_value_list
    )
    for _ in range(150):
        changed = bytearray(conversation)
        for _ in range(rng.choice([1, 3, 30])):
            changed[rng.choice([rng.randrange(700), rng.randrange(len(changed))])] = rng.randrange(256)
        with connect(node) as connection, contextlib.suppress(OSError):
            connection.sendall(changed[: rng.choice([len(changed), rng.randrange(len(changed))])])
    assert echoscu(node.port).returncode == 0
    wait_until(lambda: node.status()["associations"] == 0)
    wait_until(lambda: not list(queue.incoming.iterdir()))
    wait_until(lambda: len(dicom_threads()) <= 2)


def test_closing_the_node_ends_a_store_that_goes_on(start_node: Start, queue: Queue) -> None:
    node = start_node(network_timeout_s=30.0)
    association = associate(node)
    for one in parts(store_request())[:-3]:
        association.dul.send_pdu(one)
    wait_until(lambda: list(queue.incoming.iterdir()))
    begin = time.monotonic()
    node.close()
    assert time.monotonic() - begin < 4.0
    assert list(queue.incoming.iterdir()) == []
    assert not [name for name in dicom_threads() if "listener" in name or "connection" in name]


def test_two_hundred_associations_leave_no_thread_and_no_descriptor(
    start_node: Start, queue: Queue, tmp_path: Path
) -> None:
    make_object(tmp_path / "a.dcm")
    node = start_node()
    assert storescu(node.port, tmp_path / "a.dcm").returncode == 0
    wait_until(lambda: node.status()["associations"] == 0)
    wait_until(lambda: len(dicom_threads()) <= 2)
    before = len(os.listdir("/proc/self/fd")), len(dicom_threads())  # noqa: PTH208
    request = association_request()
    for index in range(200):
        with connect(node) as connection:
            connection.sendall(request)
            assert connection.recv(1) == b"\x02"
            if index % 3 == 0:  # released, aborted, or cut
                connection.sendall(b"\x05\x00\x00\x00\x00\x04" + bytes(4))
            elif index % 3 == 1:
                connection.sendall(b"\x07\x00\x00\x00\x00\x04" + bytes(4))
            assert index % 3 == 2 or closed(connection)
    wait_until(lambda: node.status()["associations"] == 0)
    wait_until(lambda: (len(os.listdir("/proc/self/fd")), len(dicom_threads())) <= before)  # noqa: PTH208


def association_request(sop_class: str = "1.2.840.10008.1.1") -> bytes:
    """Return the PDU that requests an association."""

    def item(kind: int, value: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(value)) + value

    context = b"\x01\x00\x00\x00" + item(0x30, sop_class.encode()) + item(0x40, b"1.2.840.10008.1.2")
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3.4")
    variable = item(0x10, b"1.2.840.10008.3.1.1.1") + item(0x20, context) + item(0x50, user)
    fixed = struct.pack(">HH16s16s32s", 1, 0, b"ECHOQUAD".ljust(16), b"CART".ljust(16), bytes(32))
    return struct.pack(">BBI", 1, 0, len(fixed + variable)) + fixed + variable
