"""A service whose every corner holds values of patients, and the search for them in a report."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from echoquad_deploy.support_report import write_support_report
from echoquad_runtime.engine.diagnostics import DiagnosticCheck, DiagnosticReport

NAME, IDENTIFIER, BIRTH, ACCESSION = "Zwetschgenbaum", "PID-4711-0815", "19570314", "ACC99887766"
UID = "1.2.826.0.1.3680043.8.498.12345678901234567890"
DISEASE, TOKEN, PASSWORD, HOST, AE = (
    "Cardiomyopathia-rarissima",
    "tok-s3cr3t-Xyzzy",
    "hunter2pw",
    "pacs7.stmary",
    "MARYECHO9",
)
PLANTED = (NAME, IDENTIFIER, BIRTH, "1957-03-14", ACCESSION, UID, DISEASE, TOKEN, PASSWORD, HOST, AE)
READY_S = 60.0


def spellings(value: str) -> Iterator[bytes]:
    """Yield a value as it may stand in a file: in other cases, UTF-16, hexadecimal, and base64 at each alignment."""
    for text in {value, value.upper(), value.lower()}:
        raw = text.encode()
        yield raw
        yield raw.hex().encode()
        yield text.encode("utf-16-le")
        for shift in range(3):  # without the characters that depend on the neighbours
            yield base64.b64encode(b"\0" * shift + raw)[4 if shift else 0 : -4]


def assert_clean(report: Path) -> None:
    """Look for the planted values in the bytes of the archive, and in name, comment and text of each member."""
    with zipfile.ZipFile(report) as archive:
        parts = {"the archive": report.read_bytes(), "comment": archive.comment}
        for info in archive.infolist():
            parts[info.filename] = archive.read(info)
            parts[f"name of {info.filename}"] = info.filename.encode() + info.comment + info.extra
    for part, data in parts.items():
        found = [value for value in PLANTED for spelling in spellings(value) if spelling in data]
        assert found == [], f"{part} holds {found}: {data.decode('utf-8', 'replace')[:2000]}"


def members(report: Path) -> dict[str, Any]:
    """Return the JSON members by name without suffix, and the lines of the log."""
    with zipfile.ZipFile(report) as archive:
        names = archive.namelist()
        loaded = {
            name.removesuffix(".json"): json.loads(archive.read(name)) for name in names if name.endswith(".json")
        }
        return {**loaded, "log": [json.loads(line) for line in archive.read("log.jsonl").splitlines()]}


@dataclass
class Site:
    """A hospital's machine with a running service, or without.

    Attributes
    ----------
    bundle, config, log, store
        The files of the service.
    port
        Where it listens.
    """

    folder: Path
    bundle: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.folder / f"{NAME}.toml"

    @property
    def log(self) -> Path:
        return self.folder / f"{IDENTIFIER}.log"

    @property
    def store(self) -> Path:
        return self.folder / f"store of {NAME}"

    def report(self, target: Path, *options: str | Path, code: int = 0, umask: int = 0o022) -> str:
        """Run ``echoquad doctor --report`` and return stderr."""
        given = options or ("--bundle", self.bundle, "--config", self.config, "--log", self.log)
        ended = subprocess.run(
            [sys.executable, "-m", "echoquad", "doctor", "--device", "cpu", "--report", str(target), *map(str, given)],
            check=False,
            capture_output=True,
            encoding="utf-8",
            env=os.environ | self.environment,
            umask=umask,
        )
        assert ended.returncode == code, ended.stderr
        assert "Traceback" not in ended.stderr
        return ended.stderr

    def write(self, target: Path, *, log: Path | None = None) -> None:
        """Write the report in this process, which is faster: without the checks of the devices."""
        checks = (DiagnosticCheck("torch", "failed", f"OSError: no file {self.folder}/{NAME} for {IDENTIFIER}"),)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            write_support_report(
                target,
                DiagnosticReport("cpu", checks, {}),
                device="cpu",
                bundle=self.bundle,
                config=self.config,
                log=log or self.log,
            )

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "echoquad", "serve", str(self.bundle), "--config", str(self.config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.wait_until(lambda: self.get("/api/v1/ready")[0] == 200)

    def wait_until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + READY_S
        while not condition():
            assert time.monotonic() < end and self.process and self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            finally:
                self.process.kill()

    def get(self, target: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("POST" if body else "GET", target, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:
            return 0, b""
        finally:
            connection.close()


def dicom_file(pixels: Any) -> bytes:
    """Return an ultrasound image of the made-up patient."""
    dataset, uid = pytest.importorskip("pydicom.dataset"), pytest.importorskip("pydicom.uid")
    data = dataset.Dataset()
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.6.1", UID
    data.StudyInstanceUID, data.SeriesInstanceUID = f"{UID}.1", f"{UID}.2"
    data.PatientName, data.PatientID, data.PatientBirthDate = f"{NAME}^Anna", IDENTIFIER, BIRTH
    data.StudyDate, data.AccessionNumber, data.StudyDescription = BIRTH, ACCESSION, DISEASE
    data.Modality, data.InstanceNumber, data.StationName = "US", 1, AE
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OB"
    data.file_meta = dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = data.SOPClassUID, UID
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


CONFIG = f"""
# {NAME}, born {BIRTH}, is waiting; password {PASSWORD}
[http]
port = PORT
token_file = "{TOKEN}.txt"
allowed_hosts = ["{HOST}"]
[store]
folder = "store of {NAME}"
min_free_mb = 0
[[folder]]
path = "exam of {NAME} {ACCESSION}" # {DISEASE}
[[destination]]
name = "{NAME}"
type = "folder"
path = "results {IDENTIFIER}"
[[destination]]
name = "hook"
type = "webhook"
url = "http://127.0.0.1:9/{NAME}/{ACCESSION}?token={TOKEN}"
token_file = "{TOKEN}.txt"
"""


@pytest.fixture
def site(tmp_path: Path, make_tiny_bundle: Callable[..., Path]) -> Site:
    """A machine whose folders, configuration and bundle hold values of patients."""
    folder = tmp_path / f"{NAME} {BIRTH}" / UID
    folder.mkdir(parents=True)
    bundle = make_tiny_bundle(folder / f"bundle of {NAME}", classes=(DISEASE, NAME))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    found = Site(folder, bundle, port)
    (folder / f"{TOKEN}.txt").write_text(f"{TOKEN}-{PASSWORD}-with-thirty-two-characters", "ascii")
    (folder / f"{TOKEN}.txt").chmod(0o600)
    found.config.write_text(CONFIG.replace("PORT", str(port)), "utf-8")
    (folder / f"exam of {NAME} {ACCESSION}").mkdir()
    found.environment = {"TMPDIR": str(folder), "TZ": NAME, "ECHOQUAD_CACHE_DIR": str(folder / NAME)}
    return found


@pytest.fixture
def running(site: Site, make_frame: Callable[..., Any]) -> Iterator[Site]:
    """The machine with its service running; it has decided frames of the patient, and two deliveries fail."""
    for package in ("starlette", "uvicorn", "prometheus_client", "pydicom"):
        pytest.importorskip(package)
    site.start()
    try:
        stream = io.BytesIO()
        Image.fromarray(make_frame(1)).save(stream, "PNG")
        for body in (stream.getvalue(), dicom_file(make_frame(2))):
            status, answer = site.get(f"/api/v1/predict?name={NAME}-{IDENTIFIER}.dcm&wait=1", body)
            assert status == 200, answer
        exam = site.folder / f"exam of {NAME} {ACCESSION}"
        (exam / f"{NAME} {UID}.dcm").write_bytes(dicom_file(make_frame(3))[:-100])  # cut: it fails
        site.wait_until(lambda: len(json.loads(site.get("/api/v1/results")[1])["results"]) == 3)
        yield site
    finally:
        site.stop()


def log_line(**fields: Any) -> str:
    """Return a line in the form of the service's log."""
    line = {"time": "2026-11-27T12:00:00.000Z", "level": "INFO", "logger": "echoquad_serve", "message": "x", **fields}
    return json.dumps(line)
