"""A node with a queue in memory, DICOM objects as dcmtk sends them, and dcmtk's programs."""

from __future__ import annotations

import contextlib
import gc
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pynetdicom")

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from echoquad_serve.config import DicomNodeConfig
from echoquad_serve.dicom_network import DicomNode
from echoquad_serve.records import IncomingObject, Job

ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6.1"
MULTI_FRAME = "1.2.840.10008.5.1.4.1.1.3.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
COMPREHENSIVE_SR = "1.2.840.10008.5.1.4.1.1.88.33"

BASE = DicomNodeConfig(port=0, acse_timeout_s=1.0, network_timeout_s=3.0)


def program(name: str) -> str:
    """Return a dcmtk program; pip installs others of the same names."""
    path = Path("/usr/bin") / name
    if not path.is_file():
        pytest.skip("needs Debian's dcmtk")
    return str(path)


class Queue:
    """What the service's store does with objects: moves them, and knows repeated ones."""

    def __init__(self, folder: Path) -> None:
        self.incoming = folder / "incoming"
        self.spool = folder / "spool"
        self.incoming.mkdir()
        self.spool.mkdir()
        self.jobs: dict[str, Job] = {}
        self.objects: list[IncomingObject] = []
        self.refuse: Exception | None = None
        self.room: Exception | None = None

    def accept(self, incoming: IncomingObject) -> Job:
        if self.refuse is not None:
            raise self.refuse
        if incoming.key in self.jobs:
            return self.jobs[incoming.key]
        path = self.spool / f"{len(self.objects)}.dcm"
        incoming.path.rename(path)
        self.objects.append(replace(incoming, path=path))
        job = Job("0" * 32, path, 0.0, incoming.origin, incoming.name)
        self.jobs[incoming.key] = job
        return job

    def check_room(self, size: int) -> None:
        if self.room is not None:
            raise self.room

    def committed(self, instance: str) -> bool:
        return any(one.sop_instance_uid == instance for one in self.objects)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Allow the peers of the tests to leave sockets to the garbage collector, as pynetdicom does at times."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:Exception ignored in. <(ssl|socket)"))


@pytest.fixture(autouse=True, scope="module")
def _skip_old_objects() -> Iterator[None]:
    """Keep what the process holds from before out of each collection, which else takes a second after large imports."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _collect_garbage() -> Iterator[None]:
    """Collect what a test has left before other tests, which do not allow it, run."""
    yield
    gc.collect()


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    folder = tmp_path / "store"
    folder.mkdir()
    return Queue(folder)


@pytest.fixture
def start_node(queue: Queue, tmp_path: Path) -> Iterator[Callable[..., DicomNode]]:
    """Return a function that starts a node on a free port of loopback, with changes to its configuration."""
    nodes = []

    def start(**changes: Any) -> DicomNode:
        node = DicomNode(
            replace(BASE, **changes),
            queue.accept,
            queue.incoming,
            queue.check_room,
            committed=queue.committed,
            state=tmp_path / "state",
        )
        nodes.append(node)
        node.start()
        return node

    yield start
    for node in nodes:
        node.close()


def make_object(
    path: Path,
    *,
    sop_class: str = ULTRASOUND,
    syntax: str = ExplicitVRLittleEndian,
    frames: int = 1,
    size: int = 64,
    seed: int = 0,
) -> Dataset:
    """Write a small ultrasound image, uncompressed, and return its data set."""
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = sop_class, generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    data.PatientName, data.PatientID = "Doe^Jane", "P-4711"
    data.Modality, data.InstanceNumber = "US", 1
    data.Rows = data.Columns = size
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    if frames > 1:
        data.NumberOfFrames, data.FrameTime = frames, "33.3"
        data.FrameIncrementPointer = 0x00181063
    pixels = np.random.default_rng(seed).integers(0, 256, frames * size * size, np.uint8)
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OB"
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.save_as(path, enforce_file_format=True)
    return data


def run(*command: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout
    )


def storescu(
    port: int, *files: Path, options: Sequence[str] = (), called: str = "ECHOQUAD", calling: str = "CART"
) -> Any:
    names = map(str, files)
    return run(program("storescu"), "-v", *options, "-aet", calling, "-aec", called, "127.0.0.1", str(port), *names)


def echoscu(port: int, *options: str, called: str = "ECHOQUAD", calling: str = "CART") -> Any:
    return run(program("echoscu"), "-v", *options, "-aet", calling, "-aec", called, "127.0.0.1", str(port))


@contextlib.contextmanager
def storescp(folder: Path, *options: str) -> Iterator[int]:
    """Run dcmtk's storescp; yield its port."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    command = [program("storescp"), "-od", str(folder), "-aet", "PACS", *options, str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: listens(port))
            yield port
        finally:
            process.kill()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened in time"
        time.sleep(0.02)


def dicom_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("echoquad-dicom", "Thread-"))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
