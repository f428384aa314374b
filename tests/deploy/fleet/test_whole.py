"""The fleet check against real services with bundles, and against a hundred of them."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.bundle import Bundle

from ...serve.whole.service_process import ServiceProcess, wait_until
from .conftest import Ran, ServeCart, answering, hang_listener, http_answer

Check = Callable[..., Ran]


def test_real_services_with_the_same_and_with_another_bundle(
    tiny_bundle: Path, make_tiny_bundle: Any, tmp_path: Path, check: Check
) -> None:
    other = make_tiny_bundle(tmp_path / "older", vote="average")
    services = [ServiceProcess(bundle, tmp_path / str(index)) for index, bundle in enumerate((tiny_bundle, other))]
    with ExitStack() as stack:
        for service in services:
            service.start(wait=False)
            stack.callback(service.kill)
        for service in services:
            service.wait_ready()
        urls = [f"http://127.0.0.1:{service.port}" for service in services]
        alone = check(urls[0], "--expect", tiny_bundle, "--json")
        (box,) = json.loads(alone.out)["boxes"]
        both = check(*urls, "--expect", tiny_bundle)
    assert alone.code == 0, alone.out
    assert box["bundle_sha256"] == Bundle(tiny_bundle).manifest["manifest_sha256"]
    assert box["contract_sha256"] == Bundle(tiny_bundle).contract.sha256
    assert (box["version"], box["device"], box["provider"]) == (__version__, "cpu", "CPUExecutionProvider")
    assert box["self_test"] and box["ready"] and box["precision"] == "fp32"
    assert abs(box["clock_s"]) < 3 and box["drift"] is None
    assert both.code == 3
    assert [row.rpartition("  ")[2] for row in both.rows.values()] == [
        "ok",
        f"other bundle; expected {box['bundle_sha256'][:12]}",
    ]


def test_real_destination_that_refuses_and_real_bundle_that_fails_are_named(
    tiny_bundle: Path, make_tiny_bundle: Any, make_frame: Any, tmp_path: Path, check: Check, peers: Callable[..., str]
) -> None:
    """A webhook answers 400 for good; a bundle whose golden answers are others never becomes ready."""
    hook = peers(answering(http_answer(b"", status="400 Bad Request")))
    tables = f'[[destination]]\nname = "hook"\ntype = "webhook"\nurl = "{hook}/"\n'
    refused = ServiceProcess(tiny_bundle, tmp_path / "refused", tables)
    stream = io.BytesIO()
    Image.fromarray(make_frame(1)).save(stream, "PNG")
    refused.start()
    try:
        refused.predict(stream.getvalue(), "DOE-JANE.png")
        wait_until(lambda: refused.destination("hook")["refused"], what="the refusal")
        ran = check(f"http://127.0.0.1:{refused.port}")
    finally:
        refused.kill()
    assert ran.code == 3 and "hook refuses 1 result" in ran.out
    assert "DOE" not in ran.out + ran.err
    broken = make_tiny_bundle(tmp_path / "broken", graph={"logit_scale": 3.0})
    failing = ServiceProcess(broken, tmp_path / "failing").start(wait=False)
    assert failing.process is not None and failing.process.wait(60) == 3  # the self-test ends the service
    ran = check(f"http://127.0.0.1:{failing.port}")
    assert ran.code == 1 and "connection refused" in ran.out


def test_hundred_services_are_asked_quickly(serve: ServeCart, check: Check) -> None:
    urls = serve(sockets=100).urls
    began = time.monotonic()
    ran = check(*urls)
    assert time.monotonic() - began < 10
    assert ran.code == 0 and len(ran.rows) == 100
    assert all(row.endswith(" ok") for row in ran.rows.values())


def test_services_that_hang_are_waited_for_at_the_same_time(serve: ServeCart, check: Check) -> None:
    with hang_listener(96) as silent:
        cart = serve()
        began = time.monotonic()
        ran = check(*silent, cart.url, "--timeout", "0.5")
        assert time.monotonic() - began < 5  # 96 times 0.5 s, 32 at a time, is 1.5 s
    assert ran.code == 5 and len(ran.codes) == 96
    assert list(ran.rows.values())[-1].endswith(" ok")


def test_name_that_the_system_does_not_look_up_is_not_waited_for(
    serve: ServeCart, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up, stuck = socket.getaddrinfo, threading.Event()

    def slow(host: str, *arguments: Any, **options: Any) -> Any:
        if host.startswith("stuck-"):
            stuck.wait(20)
        return look_up("127.0.0.1" if host.startswith("stuck-") else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    began = time.monotonic()
    ran = check(*(f"http://stuck-{index}:1" for index in range(40)), serve().url, "--timeout", "0.3")
    stuck.set()
    assert time.monotonic() - began < 5
    rows = list(ran.rows.values())
    assert ran.code == 5 and len(rows) == 41 and rows[-1].endswith(" ok")
    assert all("the look-up of its name may hang" in row for row in rows[:-1])


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_signal_ends_the_command_at_once() -> None:
    with hang_listener(40) as silent:
        command = [sys.executable, "-m", "echoquad", "fleet", "check", *silent, "--timeout", "60"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        tasks = Path(f"/proc/{process.pid}/task")
        wait_until(lambda: not tasks.exists() or len(list(tasks.iterdir())) > 30, what="asking")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=30)
    assert time.monotonic() - began < 3
    assert (process.returncode, text) == (143, "interrupted\n")


@pytest.mark.parametrize("name", ["fleet", "fleet check"])
def test_help_is_shown_without_asking(name: str) -> None:
    command = [sys.executable, "-m", "echoquad", *name.split(), "--help"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert "check" in ended.stdout
