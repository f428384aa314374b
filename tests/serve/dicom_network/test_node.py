"""The DICOM node against dcmtk's echoscu and storescu: what it accepts, refuses and keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import dcmread

from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import Caller
from echoquad_serve.dicom_network import DicomNode
from echoquad_serve.errors import QueueFullError, StorageFullError

from .conftest import (
    COMPREHENSIVE_SR,
    MULTI_FRAME,
    SECONDARY_CAPTURE,
    ULTRASOUND,
    Queue,
    echoscu,
    make_object,
    program,
    run,
    storescu,
    wait_until,
)

Start = Callable[..., DicomNode]


def test_echo(start_node: Start) -> None:
    answer = echoscu(start_node().port)
    assert answer.returncode == 0, answer.stderr


def test_stored_object_is_a_file_with_the_data_set_as_it_was_sent(
    start_node: Start, queue: Queue, tmp_path: Path
) -> None:
    sent = make_object(tmp_path / "a.dcm")
    answer = storescu(start_node().port, tmp_path / "a.dcm")
    assert answer.returncode == 0, answer.stderr
    (received,) = queue.objects
    assert (received.origin, received.sender) == ("dicom", "CART")
    assert (received.sop_class_uid, received.sop_instance_uid) == (sent.SOPClassUID, sent.SOPInstanceUID)
    kept = dcmread(received.path)
    assert kept == sent
    assert kept.file_meta.TransferSyntaxUID == sent.file_meta.TransferSyntaxUID
    data = received.path.read_bytes()
    start = 132 + 12 + kept.file_meta.FileMetaInformationGroupLength
    assert received.key == f"dicom:{sent.SOPInstanceUID}:{hashlib.sha256(data[start:]).hexdigest()}"
    for value in ("Doe", "P-4711", sent.SOPInstanceUID):
        assert value not in received.name
    assert list(queue.incoming.iterdir()) == []


@pytest.mark.parametrize("sop_class", [ULTRASOUND, MULTI_FRAME, SECONDARY_CAPTURE, "1.2.840.10008.5.1.4.1.1.6"])
@pytest.mark.parametrize(
    ("encode", "propose"),
    [(("dcmcjpeg", "+eb"), "-xy"), (("dcmcjpeg", "+e1"), "-xs"), (("dcmcrle",), "-xr"), ((), "-xi")],
)
def test_classes_and_transfer_syntaxes(
    start_node: Start, queue: Queue, tmp_path: Path, sop_class: str, encode: tuple[str, ...], propose: str
) -> None:
    make_object(tmp_path / "a.dcm", sop_class=sop_class, frames=3 if sop_class == MULTI_FRAME else 1)
    sent = tmp_path / "a.dcm"
    if encode:
        sent = tmp_path / "compressed.dcm"
        command = [program(encode[0]), *encode[1:], "+un"]  # UIDs stay as they are
        assert run(*command, str(tmp_path / "a.dcm"), str(sent)).returncode == 0
    answer = storescu(start_node().port, sent, options=[propose, "-R"])
    assert answer.returncode == 0, answer.stderr
    (received,) = queue.objects
    kept, expected = dcmread(received.path), dcmread(sent)
    if encode:
        assert kept.file_meta.TransferSyntaxUID == expected.file_meta.TransferSyntaxUID
    assert kept.PixelData == expected.PixelData
    assert received.sop_class_uid == sop_class


@pytest.mark.parametrize("uid", ["1.02.003", "0" * 64])
def test_uid_of_a_careless_maker_is_taken(start_node: Start, queue: Queue, tmp_path: Path, uid: str) -> None:
    make_object(tmp_path / "a.dcm")
    assert run(program("dcmodify"), "-nb", "-m", f"SOPInstanceUID={uid}", str(tmp_path / "a.dcm")).returncode == 0
    answer = storescu(start_node().port, tmp_path / "a.dcm")
    assert answer.returncode == 0, answer.stderr
    assert [one.sop_instance_uid for one in queue.objects] == [uid]


def test_class_that_is_not_an_image_is_not_taken(start_node: Start, queue: Queue, tmp_path: Path) -> None:
    make_object(tmp_path / "a.dcm", sop_class=COMPREHENSIVE_SR)
    answer = storescu(start_node().port, tmp_path / "a.dcm")
    assert answer.returncode != 0 and queue.objects == []


def test_repeated_object_is_one_job_and_a_changed_one_is_another(
    start_node: Start, queue: Queue, tmp_path: Path
) -> None:
    data = make_object(tmp_path / "a.dcm")
    port = start_node().port
    for _ in range(3):
        assert storescu(port, tmp_path / "a.dcm").returncode == 0
    assert len(queue.objects) == 1
    data.PatientComments = "corrected"
    data.save_as(tmp_path / "a.dcm")
    assert storescu(port, tmp_path / "a.dcm").returncode == 0
    assert len(queue.objects) == 2
    assert list(queue.incoming.iterdir()) == []


@pytest.mark.parametrize("error", [QueueFullError("full"), StorageFullError("full")])
def test_full_queue_is_answered_with_out_of_resources(
    start_node: Start, queue: Queue, tmp_path: Path, error: Exception
) -> None:
    make_object(tmp_path / "a.dcm")
    queue.refuse = error
    node = start_node()
    answer = storescu(node.port, tmp_path / "a.dcm", options=["-d"])
    assert "0xa700" in answer.stderr.lower() + answer.stdout.lower()
    assert list(queue.incoming.iterdir()) == []
    assert node.status()["refused"] == 1


def test_without_room_nothing_of_an_object_is_written(start_node: Start, queue: Queue, tmp_path: Path) -> None:
    make_object(tmp_path / "a.dcm", size=1024)
    queue.room = StorageFullError("full")
    port = start_node().port
    answer = storescu(port, tmp_path / "a.dcm", options=["-d"])
    assert "0xa700" in answer.stderr.lower() + answer.stdout.lower()
    assert list(queue.incoming.iterdir()) == []
    queue.room = None
    assert storescu(port, tmp_path / "a.dcm").returncode == 0


def test_fault_of_the_queue_is_no_success(start_node: Start, queue: Queue, tmp_path: Path) -> None:
    make_object(tmp_path / "a.dcm")
    queue.refuse = RuntimeError("database")
    port = start_node().port
    answer = storescu(port, tmp_path / "a.dcm", options=["-d"])
    assert "0x0110" in answer.stderr + answer.stdout
    assert list(queue.incoming.iterdir()) == []
    queue.refuse = None
    assert storescu(port, tmp_path / "a.dcm").returncode == 0


def test_called_title_must_be_the_nodes(start_node: Start) -> None:
    answer = echoscu(start_node().port, called="OTHER")
    assert answer.returncode != 0 and "Called AE Title Not Recognized" in answer.stderr + answer.stdout


def test_calling_title_must_be_listed(start_node: Start, queue: Queue, tmp_path: Path) -> None:
    make_object(tmp_path / "a.dcm")
    node = start_node(caller=(Caller("CART"), Caller("ECHO2", "10.1.2.3"), Caller("ECHO3", "127.0.0.0/8")))
    assert storescu(node.port, tmp_path / "a.dcm").returncode == 0
    assert echoscu(node.port, calling="ECHO3").returncode == 0
    for other in ("STRANGER", "ECHO2", "cart"):
        answer = echoscu(node.port, calling=other)
        assert answer.returncode != 0 and "Calling AE Title Not Recognized" in answer.stderr + answer.stdout
    assert node.status()["rejected_associations"] == 3


def test_address_must_be_listed(start_node: Start) -> None:
    node = start_node(caller=(Caller("CART", "10.0.0.0/24"),))
    assert echoscu(node.port).returncode != 0
    wait_until(lambda: node.status()["refused_connections"] == 1)


def test_status_counts_objects(start_node: Start, tmp_path: Path) -> None:
    make_object(tmp_path / "a.dcm")
    node = start_node()
    assert node.status()["listening"] and node.status()["last_received"] is None
    assert storescu(node.port, tmp_path / "a.dcm", tmp_path / "a.dcm").returncode == 0
    status = node.status()
    assert status["received"] == 2 and status["last_received"] > 0
    wait_until(lambda: node.status()["associations"] == 0)
    node.close()
    assert not node.status()["listening"]


def test_port_that_is_taken_is_an_error_at_the_start(start_node: Start) -> None:
    with pytest.raises(ConfigError, match="choose a free port"):
        start_node(port=start_node().port)


def test_title_that_is_none_is_an_error_at_the_start(start_node: Start) -> None:
    for title in ("", "SEVENTEEN_LETTERS"):
        with pytest.raises(ConfigError, match=r"dicom\.ae_title"):
            start_node(ae_title=title)


def test_node_starts_again_after_close(start_node: Start) -> None:
    node = start_node()
    node.close()
    node.start()
    assert echoscu(node.port).returncode == 0


def test_what_a_killed_process_was_receiving_is_removed(start_node: Start, queue: Queue) -> None:
    (queue.incoming / "dicom-0123.dcm").write_bytes(bytes(1000))
    start_node()
    assert list(queue.incoming.iterdir()) == []


def test_node_listens_on_ipv6(start_node: Start) -> None:
    from pynetdicom import AE

    node = start_node(host="::1")
    entity = AE("CART")
    entity.add_requested_context("1.2.840.10008.1.1")
    association = entity.associate("::1", node.port, ae_title="ECHOQUAD")
    assert association.is_established and association.send_c_echo().Status == 0
    association.release()


def test_objects_of_many_senders_at_once(start_node: Start, queue: Queue, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    files = [tmp_path / f"{index}.dcm" for index in range(6)]
    for index, file in enumerate(files):
        make_object(file, size=700, seed=index)
    port = start_node().port
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda file: storescu(port, file), files))
    assert all(answer.returncode == 0 for answer in answers)
    assert len({one.sop_instance_uid for one in queue.objects}) == 6
    for one in queue.objects:
        assert len(dcmread(one.path).PixelData) == 700 * 700


def test_no_value_of_an_object_is_logged(
    start_node: Start, queue: Queue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent = make_object(tmp_path / "a.dcm")
    caplog.set_level(0)
    port = start_node().port
    storescu(port, tmp_path / "a.dcm")
    queue.refuse = QueueFullError("full")
    storescu(port, tmp_path / "a.dcm")
    assert "0xA700" in caplog.text
    for value in ("Doe", "P-4711", sent.SOPInstanceUID, sent.StudyInstanceUID):
        assert value not in caplog.text
