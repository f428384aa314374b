"""Destinations that fail: each recovers without loss, and holds no other up."""

from __future__ import annotations

import contextlib
import shutil
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from .load_senders import DicomSender
from .result_receivers import Archive, ResultFolder, Webhook
from .service_process import ServiceProcess, free_port, wait_until

OBJECTS = 4
PROMPT_S = 5.0  # in which the destinations that work have everything
RECOVERY_S = 25.0

Start = Callable[..., ServiceProcess]


class Site:
    """A service with a folder, a webhook and an archive, of which one is about to fail."""

    def __init__(
        self,
        start_service: Start,
        folder: Path,
        templates: list[Dataset],
        webhook: Webhook,
        archive: Archive,
        more: str = "",
        url: str = "",
    ) -> None:
        self.webhook, self.archive, self.files = webhook, archive, ResultFolder(folder)
        self.dicom_port = free_port()
        self.templates = templates
        self.service = start_service(
            f"""
[dicom]
port = {self.dicom_port}
[[destination]]
name = "files"
type = "folder"
path = "{folder}"
[[destination]]
name = "hook"
type = "webhook"
url = "{url or webhook.url}"
timeout_s = 1.0
{more}
[[destination]]
name = "pacs"
type = "dicom"
host = "127.0.0.1"
port = {archive.port}
ae_title = "PACS"
timeout_s = 1.0
"""
        )
        self.sent: list[str] = []

    def send(self, count: int = OBJECTS) -> None:
        sender = DicomSender(self.dicom_port, self.templates)
        for number in range(count):
            sender.send(number)
        sender.close()
        self.sent += sender.acknowledged

    def has(self, name: str) -> bool:
        """Return whether a destination has all results."""
        if name == "files":
            return len(self.files.ids()) == len(self.sent)
        if name == "hook":
            return len(self.webhook.effects) == len(self.sent)
        return len(self.archive.objects) == 2 * len(self.sent)

    def others_have_all(self, name: str) -> None:
        for other in {"files", "hook", "pacs"} - {name}:
            wait_until(lambda other=other: self.has(other), PROMPT_S, f"delivery to {other} while {name} fails")

    def check(self, *, refused: str = "") -> None:
        """Check that each destination has each result once, but for one that has refused them for good."""
        results = self.service.results()
        ids = sorted(one["id"] for one in results)
        assert len(ids) == len(self.sent)
        assert self.files.ids() == ids
        assert self.files.rows() == Counter((one["id"], row["file"]) for one in results for row in one["rows"])
        assert self.files.strangers() == []
        assert self.webhook.changed == self.archive.changed == []
        if refused != "hook":
            assert sorted(self.webhook.effects) == ids
        if refused != "pacs":
            assert self.archive.sources() == Counter({(kind, uid): 1 for kind in ("sr", "sc") for uid in self.sent})


@pytest.fixture
def site(
    start_service: Start, tmp_path: Path, templates: list[Dataset], webhook: Webhook, archive: Archive
) -> Callable[..., Site]:
    def make(**changes: Any) -> Site:
        return Site(start_service, tmp_path / "out", templates, webhook, archive, **changes)

    return make


def fail_and_recover(site: Site, name: str, fail: Callable[[], object], heal: Callable[[], object]) -> str:
    """Return the error that the status shows of a destination that fails while results come, then works again."""
    site.send(1)
    site.service.wait_settled(10)
    fail()
    site.send()
    site.others_have_all(name)
    shown = wait_until(lambda: site.service.destination(name)["last_error"], 10, "an error in the status")
    state = site.service.destination(name)
    assert not state["ok"] and state["waiting"] == OBJECTS
    heal()
    wait_until(lambda: site.has(name), RECOVERY_S, f"recovery of {name}")
    site.service.wait_settled(RECOVERY_S)
    state = site.service.destination(name)
    assert state["ok"] and state["refused"] == 0 and state["last_error"] is None
    site.check()
    return str(shown)


ARCHIVE_FAULTS: dict[str, tuple[Callable[[Archive], object], str]] = {
    "port-closed": (lambda archive: archive.stop(), ""),
    "silent": (lambda archive: archive.hang(), ""),
    "rejects": (lambda archive: archive.behave("reject"), ""),
    "0xA700": (lambda archive: archive.behave(0xA700), "0xA700"),
    "cuts-mid-object": (lambda archive: archive.behave("cut"), ""),
    "hangs-mid-store": (lambda archive: archive.behave("hang"), ""),
}


EVERYDAY = ("0xA700", "cuts-mid-object", "hangs")


def parameters(faults: Iterable[str]) -> list[Any]:
    """Mark what is not among the faults of everyday as slow."""
    return [fault if fault in EVERYDAY else pytest.param(fault, marks=pytest.mark.slow) for fault in faults]


@pytest.mark.parametrize("fault", parameters(ARCHIVE_FAULTS))
def test_archive_that_fails_gets_everything_later(site: Callable[..., Site], archive: Archive, fault: str) -> None:
    fail, shown = ARCHIVE_FAULTS[fault]

    def heal() -> None:
        archive.behave()
        if fault in ("port-closed", "silent"):
            archive.stop()
            archive.start()

    assert shown in fail_and_recover(site(), "pacs", lambda: fail(archive), heal)


@pytest.mark.slow
def test_archive_that_refuses_for_good_holds_up_nothing_and_is_reported(
    site: Callable[..., Site], archive: Archive
) -> None:
    one = site()
    archive.behave(0xC000)
    one.send()
    one.others_have_all("pacs")
    wait_until(lambda: one.service.destination("pacs")["refused"] == OBJECTS, 10, "the refusals")
    state = one.service.destination("pacs")
    assert not state["ok"] and state["waiting"] == 0 and "0xC000" in state["last_error"]
    archive.behave()
    one.service.stop()
    one.service.start()
    assert one.service.destination("pacs")["refused"] == OBJECTS  # nothing is forgotten
    one.send(1)
    wait_until(lambda: len(archive.objects) == 2, 10, "the delivery of a later result")
    one.service.wait_settled(10)
    one.check(refused="pacs")


@pytest.mark.slow
def test_slow_archive_gets_each_object_once(site: Callable[..., Site], archive: Archive) -> None:
    archive.behave("slow")  # two objects take longer than timeout_s, so that attempts overlap with their repeats
    one = site()
    one.send(2)
    one.others_have_all("pacs")
    wait_until(lambda: archive.stores >= 3, 15, "a repeat")
    archive.behave()
    one.service.wait_settled(RECOVERY_S)
    one.check()


WEBHOOK_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "500": ({"status": 500}, "500"),
    "503": ({"status": 503, "Retry_After": "1"}, "503"),
    "429": ({"status": 429, "Retry_After": "1"}, "429"),
    "hangs": ({"how": "hang"}, "slow"),
    "cuts": ({"how": "cut"}, "closes the connection"),
}


@pytest.mark.parametrize("fault", parameters(WEBHOOK_FAULTS))
def test_webhook_that_fails_gets_everything_later(site: Callable[..., Site], webhook: Webhook, fault: str) -> None:
    behaviour, shown = WEBHOOK_FAULTS[fault]
    assert shown in fail_and_recover(site(), "hook", lambda: webhook.behave(**behaviour), webhook.behave)


@pytest.mark.slow
def test_retry_after_is_respected(site: Callable[..., Site], webhook: Webhook) -> None:
    one = site()
    webhook.behave(status=503, Retry_After="4")
    one.send(1)
    wait_until(lambda: webhook.requests == 1)
    begin = time.monotonic()
    webhook.behave()
    wait_until(lambda: webhook.requests == 2)
    assert time.monotonic() - begin > 3.5
    one.service.wait_settled(10)
    one.check()


def test_webhook_that_refuses_for_good_holds_up_nothing_and_is_reported(
    site: Callable[..., Site], webhook: Webhook
) -> None:
    one = site()
    webhook.behave(status=400)
    one.send()
    one.others_have_all("hook")
    wait_until(lambda: one.service.destination("hook")["refused"] == OBJECTS, 10, "the refusals")
    assert webhook.requests == OBJECTS
    webhook.behave()
    one.send(1)
    wait_until(lambda: len(webhook.effects) == 1, 10, "the delivery of a later result")
    state = one.service.destination("hook")
    assert not state["ok"] and state["refused"] == OBJECTS and "400" in state["last_error"]
    one.service.wait_settled(10)
    one.check(refused="hook")


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a certificate of 127.0.0.1 that signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate, key


@pytest.mark.slow
def test_webhook_with_a_wrong_certificate_gets_everything_with_the_right_one(
    site: Callable[..., Site], tmp_path: Path
) -> None:
    right, wrong = certificate(tmp_path, "right"), certificate(tmp_path, "wrong")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*right)
    secure = Webhook(context)
    try:
        one = site(url=secure.url, more=f'tls = {{ client_ca = "{right[0]}" }}')
        one.webhook = secure
        shown = fail_and_recover(
            one, "hook", lambda: context.load_cert_chain(*wrong), lambda: context.load_cert_chain(*right)
        )
        assert "certificate" in shown
    finally:
        secure.close()


@pytest.mark.slow
def test_folder_that_is_removed_is_written_again(site: Callable[..., Site], tmp_path: Path) -> None:
    one = site()
    one.send(2)
    one.service.wait_settled(10)
    shutil.rmtree(tmp_path / "out")  # somebody cleans up
    before, one.sent = len(one.sent), []
    one.send()
    wait_until(lambda: one.has("files"), PROMPT_S, "delivery into the new folder")
    one.service.wait_settled(10)
    results = one.service.results()[before:]
    assert one.files.ids() == sorted(result["id"] for result in results)
    assert one.files.rows() == Counter((result["id"], row["file"]) for result in results for row in result["rows"])


@pytest.mark.slow
def test_folder_in_whose_place_a_file_is_gets_everything_later(site: Callable[..., Site], tmp_path: Path) -> None:
    out, aside = tmp_path / "out", tmp_path / "aside"

    def fail() -> None:
        out.rename(aside)
        out.write_bytes(b"")

    def heal() -> None:
        out.unlink()
        aside.rename(out)

    assert "folder" in fail_and_recover(site(), "files", fail, heal)


def fill(filler: Path) -> None:
    """Fill the disk with a file."""
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(b"x" * 4096)


def mount(*options: str) -> None:
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", *options], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs the right to mount file systems")


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_out(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 8 MiB as folder of results."""
    out = tmp_path / "out"
    out.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(out))
    yield out
    unmount(out)


@pytest.mark.slow
def test_folder_that_becomes_read_only_gets_everything_later(site: Callable[..., Site], small_out: Path) -> None:
    def fail() -> None:  # a mount above, since the service holds a file of the one below
        mount("--bind", str(small_out), str(small_out))
        mount("-o", "remount,bind,ro", str(small_out))

    assert "folder" in fail_and_recover(site(), "files", fail, lambda: unmount(small_out))


def test_folder_that_is_full_gets_everything_later(site: Callable[..., Site], small_out: Path) -> None:
    filler = small_out / "filler.csv.json"
    assert "space" in fail_and_recover(site(), "files", lambda: fill(filler), filler.unlink)


def test_all_destinations_fail_over_a_restart_and_recover(
    site: Callable[..., Site], webhook: Webhook, archive: Archive, tmp_path: Path
) -> None:
    one = site()
    webhook.behave("hang")
    archive.hang()
    (tmp_path / "out").write_bytes(b"")
    one.send()
    wait_until(lambda: len(one.service.results()) == OBJECTS, 10, "all decisions")
    begin = time.monotonic()
    one.service.stop()
    assert time.monotonic() - begin < 10  # whatever hangs
    one.service.start()
    one.send(2)
    webhook.behave()
    archive.stop()
    archive.start()
    (tmp_path / "out").unlink()
    one.service.wait_settled(RECOVERY_S)
    one.check()
