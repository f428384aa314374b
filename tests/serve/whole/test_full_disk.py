"""A disk that is nearly full, and one that is full: intake is refused in time, and nothing accepted is lost."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from .comparison import compare
from .load_senders import DicomSender, FolderSender, HttpSender, sending
from .result_receivers import Archive, Webhook
from .service_process import COMMITTED, ServiceProcess, destination_tables, free_port, wait_until

MIB = 1 << 20
WATERMARK_MB = 8


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 48 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fill the disk but for `leave` bytes; return the file that does."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        while (room := shutil.disk_usage(disk).free - leave) > 0:
            stream.write(bytes(min(room, MIB)))
    return filler


Make = Callable[..., tuple[ServiceProcess, int]]


@pytest.fixture
def start(tmp_path: Path, disk: Path, tiny_bundle: Path, webhook: Webhook, archive: Archive) -> Iterator[Make]:
    """Return a function that starts a service whose store is on the small disk, and returns its DICOM port too."""
    services = []

    def make() -> tuple[ServiceProcess, int]:
        folder, port = tmp_path / "service", free_port()
        (folder / "watched").mkdir(parents=True)
        tables = f"""
[dicom]
port = {port}
[[folder]]
path = "watched"
poll_s = 0.1
after = "move"
{destination_tables(webhook.url, archive.port, archive_options=COMMITTED)}"""
        store = f'folder = "{disk / "store"}"\nmin_free_mb = {WATERMARK_MB}'
        services.append(ServiceProcess(tiny_bundle, folder, tables, store))
        return services[-1].start(), port

    yield make
    for service in services:
        if service.running:
            service.kill()


def test_watermark_refuses_intake_and_what_was_accepted_is_delivered(
    disk: Path, start: Make, frames: list[bytes], templates: list[Dataset], webhook: Webhook, tmp_path: Path
) -> None:
    service, port = start()
    webhook.behave("hang")
    ids = [service.predict(frame, "before.png", f"key-{number}")[1]["id"] for number, frame in enumerate(frames)]
    filler = fill(disk, WATERMARK_MB * MIB - 1)

    status, headers, body = service.request("POST", "/api/v1/predict", frames[0])
    assert status == 503 and b'"E_STORAGE_FULL"' in body
    assert int(headers["retry-after"]) > 0
    path = tmp_path / "one.dcm"
    templates[0].save_as(path, enforce_file_format=True)
    program = Path("/usr/bin/storescu")
    if program.is_file():
        command = [program, "-v", "-aec", "ECHOQUAD", "127.0.0.1", str(port), path]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        assert "0xa700" in ended.stdout + ended.stderr or "OutOfResources" in ended.stdout + ended.stderr
    (tmp_path / "service" / "watched" / "waits.png").write_bytes(frames[0])
    wait_until(lambda: service.status()["intake"]["folder"][0]["state"] == "full", 5, "the folder's state")
    shown = service.status()
    assert shown["queue"]["full"] and shown["queue"]["waiting"] == 0
    assert len(service.results()) == len(ids)

    webhook.behave()  # what was accepted goes out, although the disk is nearly full
    wait_until(lambda: sorted(webhook.effects) == sorted(ids), 20, "the deliveries")
    filler.unlink()
    assert service.predict(frames[0], "after.png")[0] == 200
    sender = DicomSender(port, templates)
    sender.send(0)
    sender.close()
    assert sender.refused == 0


@pytest.mark.slow
def test_watched_folder_goes_on_once_there_is_room(start: Make, disk: Path, frames: list[bytes]) -> None:
    service, _ = start()
    filler = fill(disk, WATERMARK_MB * MIB - 1)
    (service.folder / "watched" / "waits.png").write_bytes(frames[0])
    wait_until(lambda: service.status()["intake"]["folder"][0]["state"] == "full", 5, "the folder's state")
    filler.unlink()
    wait_until(lambda: [one["name"] for one in service.results()] == ["waits.png"], 75, "the file's result")


@pytest.mark.parametrize("rounds", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_disk_that_is_full_at_any_moment_loses_nothing(
    disk: Path,
    start: Make,
    frames: list[bytes],
    templates: list[Dataset],
    webhook: Webhook,
    archive: Archive,
    rounds: int,
) -> None:
    service, port = start()
    http = [
        HttpSender(service.port, frames, "keyed", keyed=True, wait=True),
        HttpSender(service.port, frames, "queued", keyed=True, wait=False),
        HttpSender(service.port, frames, "once", keyed=False, wait=True),
    ]
    files = FolderSender(service.folder / "watched", frames, "file")
    modality = DicomSender(port, templates)
    with sending(*http, files, modality):
        for _ in range(rounds):
            time.sleep(0.7)
            filler = fill(disk, 0)  # past the watermark within milliseconds: objects are on their way everywhere
            time.sleep(1.0)
            assert service.is_ready()
            filler.unlink()
        time.sleep(0.5)
    assert sum(one.refused for one in http) > 0
    service.stop()  # a watched folder waits for a minute after a refusal
    service.start()
    service.wait_settled()
    compare(service, http, files, modality, webhook, archive)
