"""A day's work in minutes, again and again: memory, threads and descriptors do not grow."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from .load_senders import DicomSender, FolderSender, HttpSender, sending
from .result_receivers import Archive, Webhook
from .service_process import COMMITTED, ServiceProcess, destination_tables, free_port, wait_until

POOLS = 4  # threads of pools that start when they are first needed
READS = ("/", "/api/v1/status", "/api/v1/info", "/api/v1/results?limit=20", "/metrics", "/openapi.json", "/nothing")


class Visitors:
    """Pages that come and go: they read, follow events for a moment, and leave without a word."""

    def __init__(self, service: ServiceProcess, dicom_port: int, threads: int = 3) -> None:
        self.visits = 0
        self._service, self._dicom_port = service, dicom_port
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(threads)]

    def __enter__(self) -> Visitors:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stopping.wait(0.03):
            with contextlib.suppress(OSError, http.client.HTTPException):
                chance.choice((self._read, self._follow, self._scan, self._cut))(chance)
                self.visits += 1

    def _read(self, chance: random.Random) -> None:
        self._service.request("GET", chance.choice(READS))

    def _follow(self, chance: random.Random) -> None:
        connection = self._service.connect(5)
        try:
            connection.request("GET", "/api/v1/events", headers={"Last-Event-ID": "1"} if chance.random() < 0.5 else {})
            answer = connection.getresponse()
            for _ in range(chance.randint(1, 20)):
                answer.readline()
        finally:
            connection.close()

    def _scan(self, _: random.Random) -> None:
        for port in (self._service.port, self._dicom_port):
            with socket.create_connection(("127.0.0.1", port), 5) as probe:
                probe.sendall(b"\r\n")

    def _cut(self, _: random.Random) -> None:
        """Begin to send a frame, and leave."""
        with socket.create_connection(("127.0.0.1", self._service.port), 5) as probe:
            probe.sendall(b"POST /api/v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n\x89PNG")


def soak(
    folder: Path,
    bundle: Path,
    make_bundle: Callable[..., Path],
    frames: list[bytes],
    templates: list[Dataset],
    webhook: Webhook,
    archive: Archive,
    *,
    cycles: int,
    seconds: float,
    growth_mb: float,
) -> str:
    """Run cycles of load and rest, and compare what the service holds after each; return the figures."""
    dicom_port = free_port()
    watched, bundles = folder / "watched", folder / "bundles"
    watched.mkdir(parents=True)
    bundles.mkdir()
    for name, vote in (("one", "average"), ("two", "majority")):
        make_bundle(bundles / name, vote=vote)
    destinations = destination_tables(
        webhook.url, archive.port, hook_options="timeout_s = 1.0", archive_options=f"{COMMITTED}\ntimeout_s = 5.0"
    )
    tables = f"""
[model]
bundle_folder = "{bundles}"
[dicom]
port = {dicom_port}
[[folder]]
path = "{watched}"
poll_s = 0.2
after = "delete"
{destinations}"""
    service = ServiceProcess(bundle, folder, tables, "min_free_mb = 0\nkeep_days = 0.0001").start()  # 9 s
    samples, sent, visits = [], 0, 0
    try:
        for cycle in range(cycles):
            senders = [
                HttpSender(service.port, frames, f"a{cycle}", keyed=True, wait=True, pause_s=0.005),
                HttpSender(service.port, frames, f"b{cycle}", keyed=False, wait=False, pause_s=0.02),
                FolderSender(watched, frames, f"c{cycle}", pause_s=0.05),
                DicomSender(dicom_port, templates, pause_s=0.1),
            ]
            with Visitors(service, dicom_port) as visitors, sending(*senders):
                time.sleep(seconds / 3)
                archive.stop()  # it restarts
                webhook.behave(status=500)
                name = ("one", "two")[cycle % 2]
                status, _, body = service.request(
                    "POST", "/api/v1/bundle", f'{{"folder": "{name}"}}'.encode(), Content_Type="application/json"
                )
                assert status == 200, body
                time.sleep(seconds / 3)
                archive.start()
                webhook.behave()
                time.sleep(seconds / 3)
            sent += sum(len(one.acknowledged) for one in senders)
            visits += visitors.visits
            for destination in ("hook", "pacs"):
                service.request("POST", f"/api/v1/destinations/{destination}/retry")
            service.wait_settled(60)
            wait_until(lambda: not any(":" in name for name in connections(service)), 15, "the end of all connections")
            samples.append((service.memory_mb(), service.threads(), service.descriptors()))
        assert len(webhook.effects) == sent
        kept = len(service.results())
        assert service.stop() in (0, 130, 143)
    finally:
        if service.running:
            service.kill()
    memory, threads, descriptors = zip(*samples, strict=True)
    figures = (
        f"{cycles} cycles: {sent} objects, {visits} visits, {kept} results kept; after each cycle MB "
        f"{[round(one) for one in memory]}, threads {list(threads)}, descriptors {[len(one) for one in descriptors]}"
    )
    early = max(1, cycles // 3)  # the first cycles fill pools and caches
    assert max(memory[early:]) - max(memory[:early]) < growth_mb, figures
    assert max(threads[early:]) <= max(threads[:early]) + POOLS, figures
    assert len(descriptors[-1]) <= max(map(len, descriptors[:early])) + 1, set(descriptors[-1]) - set(descriptors[0])
    assert "Traceback" not in service.log.read_text("utf-8", "replace")
    return figures


def connections(service: ServiceProcess) -> list[str]:
    """Return the TCP connections of the service that somebody has opened and not closed: remote addresses."""
    assert service.process is not None
    inodes = {name[8:-1] for name in service.descriptors() if name.startswith("socket:")}
    lines = Path(f"/proc/{service.process.pid}/net/tcp").read_text().splitlines()[1:]
    return [line.split()[2] for line in lines if line.split()[9] in inodes and line.split()[3] != "0A"]  # 0A: LISTEN


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("cycles", "seconds", "growth_mb"),
    # 24 cycles: one for each hour of a day, with about the objects of a busy hour.
    [(2, 1.2, 30.0), pytest.param(24, 6.0, 25.0, marks=pytest.mark.slow)],
)
def test_cycles_of_work_leave_nothing_behind(
    tmp_path: Path,
    tiny_bundle: Path,
    make_tiny_bundle: Callable[..., Path],
    frames: list[bytes],
    templates: list[Dataset],
    webhook: Webhook,
    archive: Archive,
    capsys: pytest.CaptureFixture[str],
    cycles: int,
    seconds: float,
    growth_mb: float,
) -> None:
    figures = soak(
        tmp_path,
        tiny_bundle,
        make_tiny_bundle,
        frames,
        templates,
        webhook,
        archive,
        cycles=cycles,
        seconds=seconds,
        growth_mb=growth_mb,
    )
    with capsys.disabled():
        print(f"\n{figures}")  # noqa: T201
