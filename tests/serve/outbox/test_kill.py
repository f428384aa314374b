"""kill -9 in the middle of delivering: after restarts each result has one effect at a folder and at a webhook."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_serve.config import StoreConfig
from echoquad_serve.queue import JobStore
from echoquad_serve.records import IncomingObject, Result

SERVICE = """
import sys, time
from pathlib import Path
from echoquad_serve.config import DestinationConfig, StoreConfig
from echoquad_serve.outbox.folder_destination import FolderDestination
from echoquad_serve.outbox.outbox import Outbox
from echoquad_serve.outbox.webhook_destination import WebhookDestination
from echoquad_serve.queue import JobStore

store = JobStore(StoreConfig(folder=Path(sys.argv[1]), min_free_mb=0), ["files", "hook"])
files = DestinationConfig("files", "folder", path=Path(sys.argv[2]))
hook = DestinationConfig("hook", "webhook", url=sys.argv[3])
outbox = Outbox(store, [(files, FolderDestination(files)), (hook, WebhookDestination(hook))])
outbox.start()
print("started", flush=True)
while any(store.status()["destinations"][name]["waiting"] for name in ("files", "hook")):
    time.sleep(0.01)
outbox.close()
store.close()
"""


def fill(folder: Path, make_row: Callable[..., Any], count: int) -> list[Result]:
    store = JobStore(StoreConfig(folder=folder, min_free_mb=0), ["files", "hook"])
    results = []
    for number in range(count):
        path = store.incoming / f"{number}.avi"
        path.write_bytes(b"clip")
        store.accept(IncomingObject(path, "folder", f"{number}.avi"))
        (job,) = store.take(1, 5)
        rows = tuple(make_row(f"{number}.avi#{frame}") for frame in range(1, 6))
        results.append(
            store.finish(Result(job.id, "done", "folder", job.name, job.received, 1_795_740_000.0 + number, rows))
        )
    store.close()
    return results


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(("count", "kills"), [(60, 6), pytest.param(400, 40, marks=pytest.mark.slow)])
def test_each_result_has_one_effect(
    tmp_path: Path, serve: Callable[..., Any], make_row: Callable[..., Any], count: int, kills: int
) -> None:
    results = fill(tmp_path / "store", make_row, count)
    ids = [result.id for result in results]
    server = serve(b"HTTP/1.1 204 No Content\r\n\r\n")
    command = [sys.executable, "-c", SERVICE, str(tmp_path / "store"), str(tmp_path / "out"), server.url]
    chance = random.Random(5)
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as service:
            assert service.stdout is not None and service.stdout.readline() == b"started\n"
            last = len(server.requests) + chance.randint(1, count // kills - 3)
            while len(server.requests) < last and service.poll() is None:
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.01))
            service.kill()
    before = len(server.requests)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert 0 < before < len(server.requests)  # kills came in the middle

    effects: dict[str, Any] = {}  # as a receiver that knows the key does nothing more
    for headers, body in server.requests:
        assert effects.setdefault(headers["idempotency-key"], body) == body
    assert list(effects) == ids
    files = sorted((tmp_path / "out" / "2026-11-27").iterdir())
    assert [json.loads(path.read_text())["id"] for path in files] == sorted(ids)
    with (tmp_path / "out" / "2026-11-27.csv").open(newline="") as stream:
        rows = [(row["id"], row["file"]) for row in csv.DictReader(stream)]
    assert rows == [(result.id, row["file"]) for result in results for row in result.rows]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"2026-11-27", "2026-11-27.csv", ".echoquad.lock"}
