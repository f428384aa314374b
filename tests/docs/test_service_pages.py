"""The pages of the service are true: their configuration files load, and their commands succeed against a service."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_serve.config import ServiceConfig, load_config

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (DOCS / "how-to" / "service.md", DOCS / "reference" / "service.md")
PROGRAMS = ("curl", "echoscu", "storescu", "echoquad audit", "cp", "mv")
READY = '{"ready":true,"reasons":[]}'
CONFIG = """
[http]
port = {http}
[model]
bundle_folder = "bundles"
[dicom]
port = {dicom}
[[destination]]
name = "archive"
type = "folder"
path = "results"
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", [text for page in PAGES for text in blocks(page, "toml")])
def test_configuration_file_of_a_page_loads(text: str, tmp_path: Path) -> None:
    (tmp_path / "service.toml").write_text(text)
    assert load_config(tmp_path / "service.toml") != ServiceConfig()


def commands() -> Iterator[str]:
    """Yield the commands of the pages that a service on this machine can answer, in their order."""
    for page in PAGES:
        for block in blocks(page, "console"):
            for line in re.findall(r"^\$ (.+)$", block, re.MULTILINE):
                if line.startswith(PROGRAMS) and "https://" not in line:
                    yield line


@pytest.fixture
def folder(tiny_bundle: Path, make_tiny_bundle: Any, make_frame: Any, tmp_path: Path) -> Path:
    """Return a folder with the files that the commands name."""
    pydicom = pytest.importorskip("pydicom")
    frame = make_frame(1)
    Image.fromarray(frame).save(tmp_path / "frame.png")
    data = pydicom.Dataset()
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.3.4"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = "1.2.3", "1.2.3.1", "US"
    data.Rows, data.Columns = frame.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = np.ascontiguousarray(frame).tobytes()
    data["PixelData"].VR = "OB"
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    data.save_as(tmp_path / "exam.dcm", enforce_file_format=True)
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    make_tiny_bundle(tmp_path / "new-bundle", vote="average")
    (tmp_path / "bundles").mkdir()
    return tmp_path


@pytest.mark.skipif(os.name != "posix", reason="the commands are those of a shell")
def test_commands_of_the_pages_succeed(folder: Path) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    pytest.importorskip("pynetdicom", reason="needs the extra pacs")
    if missing := [name for name in ("curl", "/usr/bin/storescu") if shutil.which(name) is None]:
        pytest.skip(f"needs {missing[0]} (Debian: curl, dcmtk)")
    ports = {"http": free_port(), "dicom": free_port()}
    with served(folder, CONFIG.format(**ports)):
        ran = {line: run(line, folder, ports) for line in commands()}
        if util.find_spec("tritonclient"):
            (program,) = blocks(PAGES[0], "python")
            code = program.replace(":8770", f":{ports['http']}")
            python = [sys.executable, "-c", code]
            answer = subprocess.run(python, cwd=folder, check=True, capture_output=True, text=True).stdout
            assert re.fullmatch(r"\[b'(ASD|NORM)'\] \[[01]\.\d*\]\n", answer)
    assert len(ran) >= 18
    assert {line: code for line, (code, _) in ran.items() if code != (28 if " -N " in line else 0)} == {}
    answers = {line: json.loads(text) for line, (_, text) in ran.items() if text.startswith("{")}
    assert [answer for answer in answers.values() if "error" in answer] == []
    statuses = {answer["status"] for line, answer in answers.items() if "predict" in line and "wait=0" not in line}
    assert statuses == {"done"}
    assert (folder / "overlay.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(os.name != "posix", reason="the commands are those of a shell")
def test_commands_for_a_token_and_for_certificates_succeed(folder: Path) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    if missing := [name for name in ("curl", "openssl") if shutil.which(name) is None]:
        pytest.skip(f"needs {missing[0]} (Debian: {missing[0]})")
    text = PAGES[0].read_text("utf-8")
    (config,) = [block for block in blocks(PAGES[0], "toml") if "token_file" in block]
    lines = re.findall(r"^\$ (.+)$", text, re.MULTILINE)
    (make_token,) = [line for line in lines if "openssl rand" in line]
    with_token, with_certificate = [line for line in lines if "https://cart-7" in line]
    issue_certificates(folder, "cart-7", "station-3")
    ports = {"http": free_port(), "dicom": ""}
    config = config.replace("[http]", f"[http]\nport = {ports['http']}").replace("0.0.0.0", "127.0.0.1")
    assert run(make_token, folder, ports)[0] == 0
    with served(folder, config):
        assert run(with_token, folder, ports) == (0, READY)
    authority = re.findall(r'`(client_ca = "[^"]+")`', text)[0]
    with served(folder, config.replace(" }", f", {authority} }}")):
        assert run(with_certificate, folder, ports) == (0, READY)
        assert run(with_token, folder, ports)[0] != 0


def issue_certificates(folder: Path, *names: str) -> None:
    """Make an authority, and for each name a certificate for it in the domain of the page."""
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    lines = [f"openssl req -x509 {key} -days 2 -subj /CN=Authority -keyout ca-key.pem -out ca.pem"]
    for name in names:
        (folder / f"{name}.ext").write_text(f"subjectAltName=DNS:{name}.ward.example")
        lines += [
            f"openssl req {key} -subj /CN={name} -keyout {name}-key.pem -out {name}.csr",
            f"openssl x509 -req -in {name}.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 "
            f"-extfile {name}.ext -out {name}.pem",
        ]
    for line in lines:
        subprocess.run(line.split(), cwd=folder, check=True, capture_output=True)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@contextmanager
def served(folder: Path, config: str) -> Iterator[None]:
    """Serve the folder's bundle with a configuration; the service has to end in good order."""
    (folder / "service.toml").write_text(config)
    command = [sys.executable, "-m", "echoquad", "serve", "bundle", "--config", "service.toml"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as service:
        assert service.stderr is not None
        try:
            assert any(line.startswith("ready: ") for line in service.stderr)
            yield
        finally:
            service.send_signal(signal.SIGTERM)
            service.stderr.read()
    assert service.returncode == 143


def run(line: str, folder: Path, ports: dict[str, str]) -> tuple[int, str]:
    """Run a command as a user does, against the ports of the service; return its exit code and its output."""
    line = line.replace(":8770", f":{ports['http']}").replace(" 11112", f" {ports['dicom']}")
    options = f"-sS --fail-with-body --max-time {2 if ' -N ' in line else 30}"
    options += f" --resolve cart-7.ward.example:{ports['http']}:127.0.0.1"
    line = re.sub(r"^curl ", f"curl {options} ", line)
    line = re.sub(r"^(echoscu|storescu) ", r"/usr/bin/\1 ", line)
    line = line.replace("echoquad audit", f"{sys.executable} -m echoquad audit")
    ended = subprocess.run(
        ["bash", "-c", line], cwd=folder, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return ended.returncode, ended.stdout + ended.stderr
