"""Orthanc as archive: stores what the client sends and commits to it, and asks the node for commitment."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echoquad_serve.config import Caller
from echoquad_serve.dicom_network import DicomNode, StoreClient
from echoquad_serve.errors import DeliveryError

from .conftest import (
    COMPREHENSIVE_SR,
    SECONDARY_CAPTURE,
    ULTRASOUND,
    Queue,
    free_port,
    make_object,
    storescu,
    wait_until,
)

Start = Callable[..., DicomNode]
ORTHANC = shutil.which("Orthanc") or "/usr/sbin/Orthanc"

pytestmark = pytest.mark.skipif(not Path(ORTHANC).is_file(), reason="needs Debian's orthanc")


class Orthanc:
    """A running Orthanc with its two ports."""

    def __init__(self, http: int, dicom: int) -> None:
        self.http, self.dicom = http, dicom

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", data, timeout=10) as answer:
            return json.loads(answer.read())

    def instances(self) -> list[str]:
        found = self.ask("/tools/find", {"Level": "Instance", "Query": {}, "Expand": True})
        return sorted(one["MainDicomTags"]["SOPInstanceUID"] for one in found)


@pytest.fixture
def start_orthanc(tmp_path: Path) -> Iterator[Callable[..., Orthanc]]:
    """Return a function that starts Orthanc on loopback; it knows EchoQuad at a port."""
    with contextlib.ExitStack() as stack:

        def start(echoquad_port: int, dicom: int | None = None, **settings: Any) -> Orthanc:
            orthanc = Orthanc(free_port(), dicom or free_port())
            folder = tmp_path / "orthanc"
            folder.mkdir(exist_ok=True)
            configuration = {
                "Name": "archive",
                "StorageDirectory": str(folder),
                "IndexDirectory": str(folder),
                "HttpPort": orthanc.http,
                "RemoteAccessAllowed": False,
                "AuthenticationEnabled": False,
                "DicomAet": "ORTHANC",
                "DicomPort": orthanc.dicom,
                "DicomCheckCalledAet": True,
                "DicomModalities": {
                    "echoquad": {
                        "AET": "ECHOQUAD",
                        "Host": "127.0.0.1",
                        "Port": echoquad_port,
                        "AllowStorageCommitment": True,
                    }
                },
                "Plugins": [],
                **settings,
            }
            file = tmp_path / "orthanc.json"
            file.write_text(json.dumps(configuration))
            log = stack.enter_context((tmp_path / "orthanc.log").open("wb"))
            process = stack.enter_context(subprocess.Popen([ORTHANC, str(file)], stdout=log, stderr=log))
            stack.callback(process.kill)
            wait_until(lambda: answers(orthanc))
            return orthanc

        yield start


def answers(orthanc: Orthanc) -> bool:
    try:
        return bool(orthanc.ask("/system"))
    except OSError:
        return False


@pytest.fixture
def objects(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "report.dcm", tmp_path / "picture.dcm"]
    make_object(files[0], sop_class=COMPREHENSIVE_SR, size=8)
    make_object(files[1], sop_class=SECONDARY_CAPTURE, size=64)
    return files


def client(orthanc: Orthanc, node: DicomNode | None, **options: Any) -> StoreClient:
    reports = None if node is None else node.reports
    return StoreClient(
        "127.0.0.1", orthanc.dicom, "ORTHANC", **{"timeout_s": 10.0, "commitment": True, "reports": reports, **options}
    )


def test_archive_keeps_and_commits_what_the_client_sends(
    start_node: Start, start_orthanc: Callable[..., Orthanc], objects: list[Path]
) -> None:
    node = start_node(caller=(Caller("ORTHANC"),))
    orthanc = start_orthanc(node.port)
    client(orthanc, node).send(objects)
    stored = orthanc.instances()
    assert len(stored) == 2
    client(orthanc, node).send(objects)  # a repeat
    assert orthanc.instances() == stored


@pytest.mark.slow
def test_without_a_report_the_delivery_has_failed(
    start_node: Start, start_orthanc: Callable[..., Orthanc], objects: list[Path]
) -> None:
    node = start_node(caller=(Caller("OTHER"),))  # refuses the archive's report
    orthanc = start_orthanc(node.port)
    with pytest.raises(DeliveryError, match="list it as a caller"):
        client(orthanc, node, timeout_s=3.0).send(objects)
    assert len(orthanc.instances()) == 2
    with pytest.raises(DeliveryError, match=r"configure \[dicom\]"):
        client(orthanc, None, timeout_s=3.0).send(objects)


def test_archive_gets_the_nodes_commitment(
    start_node: Start, start_orthanc: Callable[..., Orthanc], queue: Queue, tmp_path: Path
) -> None:
    known = make_object(tmp_path / "known.dcm")
    dicom = free_port()
    node = start_node(caller=(Caller("ORTHANC", "127.0.0.1", dicom), Caller("CART")))
    orthanc = start_orthanc(node.port, dicom)
    assert storescu(node.port, tmp_path / "known.dcm").returncode == 0

    def commitment(*instances: str) -> Any:
        body = {"DicomInstances": [[ULTRASOUND, instance] for instance in instances]}
        transaction = orthanc.ask("/modalities/echoquad/storage-commitment", body)["ID"]
        wait_until(lambda: orthanc.ask(f"/storage-commitment/{transaction}")["Status"] != "Pending")
        return orthanc.ask(f"/storage-commitment/{transaction}")

    assert commitment(known.SOPInstanceUID)["Status"] == "Success"
    partly = commitment(known.SOPInstanceUID, "1.2.3.4")
    assert partly["Status"] == "Failure"
    assert [one["SOPInstanceUID"] for one in partly["Success"]] == [known.SOPInstanceUID]
    assert [one["SOPInstanceUID"] for one in partly["Failures"]] == ["1.2.3.4"]
    wait_until(lambda: node.status()["pending_reports"] == 0)
    assert list((tmp_path / "state").iterdir()) == []


def test_pictures_of_an_archive_arrive(
    start_node: Start, start_orthanc: Callable[..., Orthanc], queue: Queue, tmp_path: Path
) -> None:
    node = start_node(caller=(Caller("ORTHANC"),))
    orthanc = start_orthanc(node.port)
    sent = make_object(tmp_path / "a.dcm")
    answer = storescu(orthanc.dicom, tmp_path / "a.dcm", called="ORTHANC")
    assert answer.returncode == 0, answer.stderr
    (identifier,) = orthanc.ask("/instances")
    orthanc.ask("/modalities/echoquad/store", {"Resources": [identifier], "StorageCommitment": False})
    assert [one.sop_instance_uid for one in queue.objects] == [sent.SOPInstanceUID]
    assert queue.objects[0].sender == "ORTHANC"
