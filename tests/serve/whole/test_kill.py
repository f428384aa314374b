"""kill -9 under load: whatever was acknowledged ends in one result, and once at each destination."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from echoquad_serve.monitoring.audit_verification import read_site_key, verify_audit_log

from .comparison import compare
from .load_senders import DicomSender, FolderSender, HttpSender, Sender, sending
from .result_receivers import Archive, Webhook
from .service_process import COMMITTED, ServiceProcess, destination_tables, free_port


def tables(service_folder: Path, dicom_port: int, webhook: Webhook, archive: Archive) -> str:
    watched = service_folder / "watched"
    watched.mkdir(parents=True)
    return f"""
[dicom]
port = {dicom_port}
[[folder]]
path = "{watched}"
poll_s = 0.1
after = "move"
{destination_tables(webhook.url, archive.port, archive_options=COMMITTED)}"""


def check(
    folder: Path,
    bundle: Path,
    frames: list[bytes],
    templates: list[Dataset],
    webhook: Webhook,
    archive: Archive,
    *,
    kills: int,
    longest_s: float,
) -> str:
    """Kill a service under load, then compare what was acknowledged with what has become of it; return the figures."""
    dicom_port = free_port()
    service = ServiceProcess(bundle, folder, tables(folder, dicom_port, webhook, archive))
    http = [
        HttpSender(service.port, frames, "keyed", keyed=True, wait=True),
        HttpSender(service.port, frames, "queued", keyed=True, wait=False, pause_s=0.02),
        HttpSender(service.port, frames, "once", keyed=False, wait=True, pause_s=0.01),
    ]
    files = FolderSender(folder / "watched", frames, "file")
    modality = DicomSender(dicom_port, templates)
    senders: list[Sender] = [*http, files, modality]
    chance = random.Random(11)
    begin = time.monotonic()
    try:
        with sending(*senders):
            for number in range(kills):
                service.start(wait=number % 5 != 2)  # at times killed while it starts
                time.sleep(chance.uniform(0.0, longest_s))
                service.kill()
            service.start()
            time.sleep(0.5)
        load_s = time.monotonic() - begin
        service.wait_settled()
        drained_s = time.monotonic() - begin - load_s
        compare(service, http, files, modality, webhook, archive)
        assert service.stop() in (0, 130, 143)
    finally:
        if service.running:
            service.kill()
    summary = verify_audit_log(service.store / "audit", read_site_key(service.store / "site.key"))  # it raises
    assert summary.whole and summary.entries > 2 * len(webhook.effects)
    counts = {
        "http": sum(len(one.acknowledged) for one in http),
        "folder": len(files.acknowledged),
        "dicom": len(modality.acknowledged),
    }
    return (
        f"{kills} kills in {load_s:.0f} s, all delivered {drained_s:.0f} s later: "
        f"{sum(counts.values())} objects acknowledged {counts}, "
        f"{sum(len(one.unknown) for one in http)} cut before the answer, {len(webhook.effects)} results, "
        f"{webhook.requests} requests at the webhook, {archive.stores} stores of {len(archive.objects)} DICOM objects"
    )


def test_three_kills_lose_nothing(
    tmp_path: Path,
    tiny_bundle: Path,
    frames: list[bytes],
    templates: list[Dataset],
    webhook: Webhook,
    archive: Archive,
) -> None:
    check(tmp_path / "service", tiny_bundle, frames, templates, webhook, archive, kills=3, longest_s=0.8)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_kills_lose_nothing(
    tmp_path: Path,
    tiny_bundle: Path,
    frames: list[bytes],
    templates: list[Dataset],
    webhook: Webhook,
    archive: Archive,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = check(tmp_path / "service", tiny_bundle, frames, templates, webhook, archive, kills=100, longest_s=1.2)
    with capsys.disabled():
        print(f"\n{figures}")  # noqa: T201
