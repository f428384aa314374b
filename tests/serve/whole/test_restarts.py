"""Restarts and replacements while work is outstanding: an object that crashes the service, and a new bundle."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from .load_senders import DicomSender, HttpSender, sending
from .result_receivers import Archive, Webhook
from .service_process import ServiceProcess, free_port, wait_until

Start = Callable[..., ServiceProcess]

# Loaded at the start of the interpreter: reading a certain object ends the process, as a fault in a decoder may. It
# waits for a file beside it, so that all objects are acknowledged before the first crash.
POISON = """
import os, signal, time
from pathlib import Path
from echoquad_runtime.frames import reader
import echoquad_serve.inference.inference_worker as worker
real = worker.frames_in
def frames_in(path, name, *arguments):
    if name == "poison.png":
        while not Path(__file__).with_name("armed").exists():
            time.sleep(0.02)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, name, *arguments)
worker.frames_in = frames_in
"""


def at_rest(service: ServiceProcess) -> bool:
    """Return whether the service has crashed, or has nothing left to do."""
    try:
        return not service.running or not service.outstanding()
    except OSError:  # it crashes
        return False


def test_object_that_crashes_the_service_ends_as_failed_and_holds_up_nothing(
    start_service: Start, frames: list[bytes], webhook: Webhook, tmp_path: Path
) -> None:
    service = start_service(f'[[destination]]\nname = "hook"\ntype = "webhook"\nurl = "{webhook.url}"')
    (tmp_path / "sitecustomize.py").write_text(POISON)
    service.extra_environment = {"PYTHONPATH": str(tmp_path)}
    service.stop()
    service.start()
    ids = {}
    for name in ("before.png", "poison.png", "after.png"):
        status, answer = service.predict(frames[0], name, name, wait=False)
        assert status == 202
        ids[name] = answer["id"]
    (tmp_path / "armed").touch()
    for _ in range(8):  # as systemd does
        wait_until(lambda: at_rest(service), 20, "a crash, or the end of all work")
        if service.running:
            break
        service.start(wait=False)
        wait_until(lambda: not service.running or service.is_ready(), 20, "a crash, or readiness")
    assert service.running and service.starts <= 6
    by_name = {result["name"]: result for result in service.results()}
    assert {name: by_name[name]["id"] for name in ids} == ids
    assert by_name["poison.png"]["status"] == "failed"
    assert [failure["code"] for failure in by_name["poison.png"]["failures"]] == ["E_INTERRUPTED"]
    assert {by_name[name]["status"] for name in ids if name != "poison.png"} == {"done"}
    wait_until(lambda: sorted(webhook.effects) == sorted(ids.values()), 10, "all deliveries")


@pytest.mark.parametrize("restart", [False, True], ids=["swap", "restart"])
def test_what_a_replaced_bundle_has_decided_is_delivered(
    start_service: Start,
    tiny_bundle: Path,
    make_tiny_bundle: Callable[..., Path],
    templates: list[Dataset],
    archive: Archive,
    tmp_path: Path,
    restart: bool,
) -> None:
    make_tiny_bundle(tmp_path / "bundles" / "new", vote="average")  # another contract
    port = free_port()
    service = start_service(
        f"""
[model]
bundle_folder = "{tmp_path / "bundles"}"
[dicom]
port = {port}
[[destination]]
name = "pacs"
type = "dicom"
host = "127.0.0.1"
port = {archive.port}
ae_title = "PACS"
timeout_s = 2.0
"""
    )
    archive.stop()
    sender = DicomSender(port, templates)
    for number in range(3):
        sender.send(number)
    sender.close()
    wait_until(lambda: len(service.results()) == 3, 10, "three decisions")
    if restart:
        service.stop()
        service.bundle = tmp_path / "bundles" / "new"
        service.start()
    else:
        status, _, body = service.request(
            "POST", "/api/v1/bundle", b'{"folder": "new"}', Content_Type="application/json"
        )
        assert status == 200, body
    archive.start()
    service.wait_settled(20)
    assert archive.sources() == Counter({(kind, uid): 1 for kind in ("sr", "sc") for uid in sender.acknowledged})


def test_bundles_are_swapped_under_load_without_an_error(
    start_service: Start, make_tiny_bundle: Callable[..., Path], frames: list[bytes], tmp_path: Path
) -> None:
    for name, vote in (("one", "majority"), ("two", "average")):
        make_tiny_bundle(tmp_path / "bundles" / name, vote=vote)
    service = start_service(f'[model]\nbundle_folder = "{tmp_path / "bundles"}"')
    sender = HttpSender(service.port, frames, "frame", keyed=False, wait=True)
    with sending(sender):
        for number in range(6):
            body = f'{{"folder": "{("two", "one")[number % 2]}"}}'.encode()
            target = "/api/v1/bundle/rollback" if number == 4 else "/api/v1/bundle"
            status, _, answer = service.request("POST", target, body, Content_Type="application/json")
            assert status == 200, answer
            time.sleep(0.1)
    results = service.results()
    assert sender.refused == 0 and not sender.unknown
    assert {result["status"] for result in results} == {"done"}
    assert [result["id"] for result in results] == list(sender.acknowledged.values())
    assert {"one", "two"} <= {result["bundle"]["name"] for result in results}


def test_stop_under_load_answers_what_was_accepted(start_service: Start, frames: list[bytes]) -> None:
    service = start_service()
    senders = [HttpSender(service.port, frames, f"s{number}", keyed=True, wait=True) for number in range(4)]
    with sending(*senders):
        time.sleep(0.5)
        for _ in range(3):
            begin = time.monotonic()
            assert service.stop() in (0, 130, 143)
            assert time.monotonic() - begin < 10
            service.start()
            time.sleep(0.2)
        threading.Event().wait(0.3)
    results = {result["name"]: result["id"] for result in service.results()}
    for sender in senders:
        assert {name: results[name] for name in sender.acknowledged} == sender.acknowledged
    assert "Traceback" not in service.log.read_text("utf-8", "replace")
