"""Senders that go on over restarts of the service, and note what it has acknowledged."""

from __future__ import annotations

import contextlib
import copy
import http.client
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE

ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6.1"
PAUSE_S = 0.05  # while the service is away or refuses


class Sender:
    """A thread that sends one object after another until `stop`, each until it is acknowledged.

    Attributes
    ----------
    acknowledged
        What the service has taken over, by the name or UID that the sender has given it.
    unknown
        What was sent, and not again: the connection was cut before the answer.
    refused
        Number of honest refusals, such as 429 and 503.
    pause_s
        Seconds between two objects.
    """

    def __init__(self, pause_s: float = 0.0) -> None:
        self.acknowledged: dict[str, Any] = {}
        self.unknown: set[str] = set()
        self.refused = 0
        self.faults: list[str] = []
        self.pause_s = pause_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop after the object at hand, which must be acknowledged."""
        self._stopping.set()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert not self.faults, self.faults[:3]

    def _run(self) -> None:
        try:
            for number in itertools.count():
                if self._stopping.is_set():
                    break
                self.send(number)
                self._stopping.wait(self.pause_s)
        except Exception as error:
            self.faults.append(repr(error))
        finally:
            self.close()

    def send(self, number: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Close what is open."""

    def rest(self) -> None:
        threading.Event().wait(PAUSE_S)


class HttpSender(Sender):
    """Posts frames, over one connection as long as it holds.

    Parameters
    ----------
    keyed
        Whether each object has an Idempotency-Key, and is repeated after a cut connection.
    wait
        Whether it waits for the result (200), or for the acceptance alone (202).
    """

    def __init__(
        self, port: int, frames: list[bytes], prefix: str, *, keyed: bool, wait: bool, pause_s: float = 0.0
    ) -> None:
        super().__init__(pause_s)
        self._port, self._frames, self._prefix, self._keyed, self._wait = port, frames, prefix, keyed, wait
        self._connection: http.client.HTTPConnection | None = None

    def send(self, number: int) -> None:
        name = f"{self._prefix}-{number:06}.png"
        headers = {"Idempotency-Key": name} if self._keyed else {}
        target = f"/api/v1/predict?name={name}&wait={int(self._wait)}"
        while True:
            try:
                if self._connection is None:
                    self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
                    self._connection.connect()
            except OSError:  # nothing was sent
                self.close()
                self.rest()
                continue
            try:
                self._connection.request("POST", target, self._frames[number % len(self._frames)], headers)
                answer = self._connection.getresponse()
                body = json.loads(answer.read())
            except (OSError, http.client.HTTPException, ValueError):
                self.close()
                if not self._keyed:
                    self.unknown.add(name)
                    return
                self.rest()
                continue
            if answer.status in (200, 202):
                self.acknowledged[name] = body["id"]
                return
            if answer.status not in (429, 503):
                raise AssertionError(f"{answer.status} {body}")
            self.refused += 1
            self.rest()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class FolderSender(Sender):
    """Writes frames into a watched folder. All that is there counts as handed over."""

    def __init__(self, folder: Path, frames: list[bytes], prefix: str, pause_s: float = 0.02) -> None:
        super().__init__(pause_s)
        self._folder, self._frames, self._prefix = folder, frames, prefix

    def send(self, number: int) -> None:
        name = f"{self._prefix}-{number:06}.png"
        data = self._frames[number % len(self._frames)]
        if number % 2:  # as a careful program writes
            (self._folder / f"{name}.part").write_bytes(data)
            (self._folder / f"{name}.part").rename(self._folder / name)
        else:
            (self._folder / name).write_bytes(data)
        self.acknowledged[name] = None


class DicomSender(Sender):
    """Stores objects, several over one association, as long as it holds."""

    def __init__(self, port: int, templates: list[Dataset], pause_s: float = 0.05, ae_title: str = "ECHOQUAD") -> None:
        super().__init__(pause_s)
        self._port, self._templates, self._called = port, templates, ae_title
        self._entity = AE(ae_title="CART")
        self._entity.acse_timeout = self._entity.dimse_timeout = self._entity.network_timeout = 20
        self._entity.connection_timeout = 5
        self._entity.add_requested_context(ULTRASOUND, ExplicitVRLittleEndian)
        self._association: Any = None
        self.statuses: set[int] = set()

    def send(self, number: int) -> None:
        data = copy.deepcopy(self._templates[number % len(self._templates)])
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        while True:
            if self._association is None or not self._association.is_established:
                self._association = self._entity.associate("127.0.0.1", self._port, ae_title=self._called)
                if not self._association.is_established:
                    self.rest()
                    continue
            try:
                status = self._association.send_c_store(data).get("Status")
            except RuntimeError:  # the association has ended
                status = None
            if status == 0x0000:
                self.acknowledged[str(data.SOPInstanceUID)] = None
                return
            if status is not None:
                self.statuses.add(status)
                self.refused += 1
            self.rest()

    def close(self) -> None:
        if self._association is not None and self._association.is_established:
            self._association.release()


def dicom_template(pixels: np.ndarray) -> Dataset:
    """Return an ultrasound image of a made-up patient; pixels are uint8 [height, width]."""
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = ULTRASOUND, generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = "Doe^Jane", "P-4711", "19700101", "O"
    data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20261127", "080000", "1", ""
    data.ReferringPhysicianName = ""
    data.Modality, data.InstanceNumber, data.SeriesNumber = "US", 1, 1
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OB"
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = ULTRASOUND
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    return data


@contextlib.contextmanager
def sending(*senders: Sender) -> Iterator[None]:
    """Run senders during the block; afterwards each has finished its last object."""
    for sender in senders:
        sender.start()
    try:
        yield
    finally:
        for sender in senders:
            sender.stop()
    for sender in senders:
        sender.join()


def total(senders: list[Sender], count: Callable[[Sender], int]) -> int:
    return sum(map(count, senders))
