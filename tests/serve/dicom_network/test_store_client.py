"""The client against storescp, against the node, and against peers that hang, refuse, or cut the line."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import ImplicitVRLittleEndian

from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import TlsConfig
from echoquad_serve.dicom_network import DicomNode, StoreClient, association
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError, QueueFullError

from .conftest import (
    COMPREHENSIVE_SR,
    SECONDARY_CAPTURE,
    Queue,
    dicom_threads,
    free_port,
    make_object,
    program,
    storescp,
    wait_until,
)

Start = Callable[..., DicomNode]

RELEASE = bytes.fromhex("05000000000400000000")  # A-RELEASE-RQ (PS3.8, 9.3.6)


def client(port: int, **options: Any) -> StoreClient:
    return StoreClient("127.0.0.1", port, "PACS", **{"timeout_s": 5.0, **options})


@pytest.fixture
def objects(tmp_path: Path) -> list[Path]:
    """Return the files of a report and of a key image, as far as the network is concerned."""
    files = [tmp_path / "report.dcm", tmp_path / "picture.dcm"]
    make_object(files[0], sop_class=COMPREHENSIVE_SR, size=8)
    make_object(files[1], sop_class=SECONDARY_CAPTURE, size=512)
    return files


@pytest.fixture(autouse=True)
def _no_thread_or_descriptor_stays() -> Iterator[None]:
    threads, files = len(dicom_threads()), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    wait_until(lambda: len(dicom_threads()) <= threads)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)  # noqa: PTH208


def test_release_that_never_returns_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        """An association whose peer has left at the wrong moment."""

        is_established, acse_timeout = True, 0.0

        def __init__(self) -> None:
            self.killed = threading.Event()

        def release(self) -> None:
            assert self.killed.wait(20)

        def kill(self) -> None:
            self.killed.set()

        def is_alive(self) -> bool:
            return False

    monkeypatch.setattr(association, "_RELEASE_SECONDS", 0.1)
    monkeypatch.setattr(association, "_RELEASE_SLACK_S", 0.1)
    association._end(Stuck(), association.Deadline(5.0), abort=False)  # type: ignore[arg-type]


def test_stored_objects_arrive_unchanged(tmp_path: Path, objects: list[Path]) -> None:
    with storescp(tmp_path / "pacs") as port:
        client(port).send([objects[0], objects[1].read_bytes()])
    stored = {dcmread(file).SOPInstanceUID: dcmread(file) for file in (tmp_path / "pacs").iterdir()}
    assert len(stored) == 2
    for sent in map(dcmread, objects):
        assert stored[sent.SOPInstanceUID] == sent


def test_repeat_is_harmless(tmp_path: Path, objects: list[Path]) -> None:
    with storescp(tmp_path / "pacs") as port:
        for _ in range(3):
            client(port).send(objects)
    assert len(list((tmp_path / "pacs").iterdir())) == 2


def test_archive_that_takes_implicit_syntax_alone(tmp_path: Path, objects: list[Path]) -> None:
    with storescp(tmp_path / "pacs", "+xi") as port:
        client(port).send(objects)
    for file in (tmp_path / "pacs").iterdir():
        assert dcmread(file).file_meta.TransferSyntaxUID == ImplicitVRLittleEndian


def test_compressed_object_goes_as_it_is(tmp_path: Path, objects: list[Path]) -> None:
    compressed = tmp_path / "jpeg.dcm"
    subprocess.run([program("dcmcjpeg"), "+eb", "+un", str(objects[1]), str(compressed)], check=True)
    with storescp(tmp_path / "pacs", "+xa") as port:
        client(port).send([compressed])
    (stored,) = (tmp_path / "pacs").iterdir()
    assert dcmread(stored).PixelData == dcmread(compressed).PixelData


def test_archive_without_the_compression_refuses(tmp_path: Path, objects: list[Path]) -> None:
    compressed = tmp_path / "jpeg.dcm"
    subprocess.run([program("dcmcjpeg"), "+eb", "+un", str(objects[1]), str(compressed)], check=True)
    with storescp(tmp_path / "pacs", "+xi") as port, pytest.raises(DeliveryRefusedError, match="Secondary Capture"):
        client(port).send([objects[0], compressed])
    assert len(list((tmp_path / "pacs").iterdir())) == 1  # the other object has arrived


def test_nothing_to_send_needs_no_archive() -> None:
    client(1).send([])


def test_echo(tmp_path: Path) -> None:
    with storescp(tmp_path / "pacs") as port:
        client(port).echo()
    with pytest.raises(DeliveryError):
        client(port).echo()


@pytest.mark.parametrize("option", ["--abort-after", "--abort-during"])
def test_archive_that_aborts_is_tried_again(tmp_path: Path, objects: list[Path], option: str) -> None:
    with storescp(tmp_path / "pacs", option) as port, pytest.raises(DeliveryError) as caught:
        client(port).send(objects)
    assert type(caught.value) is DeliveryError


def test_archive_that_rejects_is_tried_again(tmp_path: Path, objects: list[Path]) -> None:
    with storescp(tmp_path / "pacs", "--refuse") as port, pytest.raises(DeliveryError, match="rejects") as caught:
        client(port).send(objects)
    assert type(caught.value) is DeliveryError


@pytest.mark.parametrize("option", ["--sleep-after", "--sleep-during"])
def test_archive_that_is_too_slow_is_left_in_time(tmp_path: Path, objects: list[Path], option: str) -> None:
    begin = time.monotonic()
    with storescp(tmp_path / "pacs", option, "4") as port, pytest.raises(DeliveryError) as caught:
        begin = time.monotonic()
        client(port, timeout_s=1.0).send(objects)
    assert time.monotonic() - begin < 3.5
    assert type(caught.value) is DeliveryError


def test_archive_that_is_off(objects: list[Path]) -> None:
    with pytest.raises(DeliveryError, match="cannot be reached"):
        client(free_port()).send(objects)


def test_host_without_an_address(objects: list[Path]) -> None:
    with pytest.raises(DeliveryError, match="no address"):
        StoreClient("archive.invalid", 104, "PACS", timeout_s=2.0).send(objects)


@contextlib.contextmanager
def peer(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """Run a peer that does with its one connection what it is told; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    behave(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join(10.0)


def until_closed(connection: socket.socket) -> None:
    connection.settimeout(10.0)
    while connection.recv(65536):
        pass


def accept_association(connection: socket.socket) -> None:
    """Accept both contexts of a request."""
    import struct

    header = connection.recv(6, socket.MSG_WAITALL)
    body = connection.recv(int.from_bytes(header[2:], "big"), socket.MSG_WAITALL)

    def item(kind: int, value: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(value)) + value

    syntax = item(0x40, b"1.2.840.10008.1.2.1")
    contexts = b"".join(item(0x21, bytes([number, 0, 0, 0]) + syntax) for number in (1, 3))
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3.4")
    answer = body[:68] + item(0x10, b"1.2.840.10008.3.1.1.1") + contexts + item(0x50, user)
    connection.sendall(struct.pack(">BBI", 2, 0, len(answer)) + answer)


def silent(connection: socket.socket) -> None:
    until_closed(connection)


def silent_after_association(connection: socket.socket) -> None:
    accept_association(connection)
    until_closed(connection)


def stops_reading(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    accept_association(connection)
    time.sleep(2.5)


def cuts_in_the_middle(connection: socket.socket) -> None:
    accept_association(connection)
    connection.recv(30_000)


def closes_at_once(connection: socket.socket) -> None:
    pass


def sends_garbage(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    until_closed(connection)


def announces_much(connection: socket.socket) -> None:
    connection.sendall(b"\x02\x00\xff\xff\xff\xff")
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(bytes(65536))


def drips(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(b"\x02\x00\x00\x00\x10\x00")
        for _ in range(100):
            connection.sendall(b"\x00")
            time.sleep(0.1)


@pytest.mark.parametrize(
    "behaviour",
    [
        silent,
        silent_after_association,
        stops_reading,
        cuts_in_the_middle,
        closes_at_once,
        sends_garbage,
        announces_much,
        drips,
    ],
)
def test_whatever_a_peer_does_the_client_returns_in_time(
    tmp_path: Path, behaviour: Callable[[socket.socket], None]
) -> None:
    make_object(tmp_path / "report.dcm", sop_class=COMPREHENSIVE_SR, size=8)
    make_object(tmp_path / "picture.dcm", sop_class=SECONDARY_CAPTURE, size=3000)
    with peer(behaviour) as port:
        begin = time.monotonic()
        with pytest.raises(DeliveryError) as caught:
            client(port, timeout_s=1.0).send([tmp_path / "picture.dcm", tmp_path / "report.dcm"])
        assert time.monotonic() - begin < 2.0
    assert type(caught.value) is DeliveryError
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0xA700, DeliveryError),
        (0x0110, DeliveryError),
        (0x0122, DeliveryError),
        (0xA900, DeliveryRefusedError),
        (0xC000, DeliveryRefusedError),
        (0xC123, DeliveryRefusedError),
        (0xB000, None),
        (0xB007, None),
        (0x0111, None),
    ],
)
def test_status_of_the_archive_decides(objects: list[Path], status: int, expected: type[Exception] | None) -> None:
    from pynetdicom import AE, evt

    entity = AE("PACS")
    entity.add_supported_context(COMPREHENSIVE_SR)
    entity.add_supported_context(SECONDARY_CAPTURE)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda event: status)])
    try:
        port = server.server_address[1]
        if expected is None:
            client(port).send(objects)
        else:
            with pytest.raises(DeliveryError) as caught:
                client(port).send(objects)
            assert type(caught.value) is expected
    finally:
        server.shutdown()


def test_class_that_the_archive_does_not_take_is_refused(start_node: Start, objects: list[Path]) -> None:
    node = start_node()  # of pictures alone
    one = StoreClient("127.0.0.1", node.port, "ECHOQUAD", timeout_s=5.0)
    with pytest.raises(DeliveryRefusedError, match="Comprehensive SR"):
        one.send(objects)
    assert node.status()["received"] == 1
    with pytest.raises(DeliveryRefusedError, match="Comprehensive SR"):
        one.send(objects[:1])


def test_full_archive_is_tried_again(start_node: Start, queue: Queue, objects: list[Path]) -> None:
    queue.refuse = QueueFullError("full")
    one = StoreClient("127.0.0.1", start_node().port, "ECHOQUAD", timeout_s=5.0)
    with pytest.raises(DeliveryError, match="0xA700"):
        one.send(objects[1:])
    queue.refuse = None
    one.send(objects[1:])


def test_other_title_is_named(start_node: Start, objects: list[Path]) -> None:
    with pytest.raises(DeliveryError, match="correct ae_title"):
        StoreClient("127.0.0.1", start_node().port, "OTHER", timeout_s=5.0).send(objects)


@pytest.mark.parametrize(
    "changes",
    [
        {"host": ""},
        {"port": 0},
        {"port": 65536},
        {"ae_title": ""},
        {"ae_title": "SEVENTEEN_LETTERS"},
        {"calling_ae_title": " "},
        {"timeout_s": 0.0},
        {"tls": TlsConfig(client_ca=Path("missing.pem"))},
    ],
)
def test_configuration_that_cannot_work_is_an_error_at_the_start(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        StoreClient(**{"host": "pacs", "port": 104, "ae_title": "PACS", **changes})


def test_archive_that_does_not_answer_the_release_has_the_objects(objects: list[Path]) -> None:
    def behave(connection: socket.socket) -> None:
        accept_association(connection)
        data = b""
        while not data.endswith(RELEASE):  # two objects, then the release that is not answered
            data += (part := connection.recv(65536))
            if not part:
                return
            for number in (1, 2):
                if number not in answered and complete(data) >= number:
                    answered.append(number)
                    connection.sendall(store_answer(number))

    answered: list[int] = []
    with peer(behave) as port:
        client(port).send(objects)
    assert answered == [1, 2]


@pytest.mark.slow
def test_mutated_answers_end_in_an_answer_or_an_error(objects: list[Path]) -> None:
    import random

    rng = random.Random(11)

    def behave(connection: socket.socket) -> None:
        class Mutating:
            """A connection that changes bytes of what it sends."""

            def __init__(self) -> None:
                self.recv = connection.recv

            def sendall(self, data: bytes) -> None:
                changed = bytearray(data)
                for _ in range(rng.choice([0, 1, 3])):
                    changed[rng.randrange(len(changed))] = rng.randrange(256)
                connection.sendall(changed[: rng.choice([len(changed), rng.randrange(len(changed))])])

        mutating: Any = Mutating()
        accept_association(mutating)
        connection.settimeout(0.3)
        data = b""
        for number in (1, 2):
            while complete(data) < number:
                data += (part := connection.recv(65536))
                if not part:
                    return
            mutating.sendall(store_answer(number))

    for _ in range(40):
        with peer(behave) as port:
            begin = time.monotonic()
            with contextlib.suppress(DeliveryError):
                client(port, timeout_s=0.4).send(objects)
            assert time.monotonic() - begin < 3.0


def complete(data: bytes) -> int:
    """Return how many data sets have come, by the marks of their last fragments."""
    count, position = 0, 0
    while position + 12 <= len(data):
        length = int.from_bytes(data[position + 2 : position + 6], "big")
        count += position + 6 + length <= len(data) and data[position] == 4 and data[position + 11] == 2
        position += 6 + length
    return count


def store_answer(number: int) -> bytes:
    """Return the PDU that answers a C-STORE with success."""
    import struct

    def element(tag: int, value: bytes) -> bytes:
        return struct.pack("<HHI", 0, tag, len(value)) + value

    command = element(0x0100, b"\x01\x80") + element(0x0120, struct.pack("<H", number))
    command += element(0x0800, b"\x01\x01") + element(0x0900, b"\x00\x00")
    command = element(0x0000, struct.pack("<I", len(command))) + command
    value = bytes([2 * number - 1, 3]) + command
    return struct.pack(">BBII", 4, 0, len(value) + 4, len(value)) + value


def test_what_is_no_dicom_file_is_refused_without_its_content() -> None:
    with pytest.raises(DeliveryRefusedError) as caught:
        client(1).send([b"Doe^Jane"])
    assert "Doe" not in str(caught.value)
