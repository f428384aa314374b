"""A job store in a temporary folder, and objects to put into it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from echoquad_serve.config import StoreConfig
from echoquad_serve.queue import JobStore
from echoquad_serve.records import IncomingObject, Job, Result

ROW = {"file": "a.png", "class": "ASD", "confidence": 0.875, "flags": ["no fan"], "bundle_sha256": "0" * 64}


class OpenStore(Protocol):
    def __call__(self, *destinations: str, **config: Any) -> JobStore: ...


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[OpenStore]:
    """Open the store of the test, or open it again; every store is closed at the end."""
    opened = []

    def open_(*destinations: str, **config: Any) -> JobStore:
        opened.append(JobStore(StoreConfig(**{"folder": tmp_path / "store", "min_free_mb": 0} | config), destinations))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


_numbers = itertools.count()


@pytest.fixture
def offer() -> Callable[..., Job]:
    """Write a file into a store's folder for incoming files, and have it accepted."""

    def offer_(store: JobStore, content: bytes = b"pixels", suffix: str = ".png", **values: Any) -> Job:
        number = next(_numbers)
        path = store.incoming / f"{number}{suffix}"
        path.write_bytes(content)
        return store.accept(IncomingObject(**{"path": path, "origin": "http", "name": f"frame {number}"} | values))

    return offer_


@pytest.fixture
def finish() -> Callable[..., Result]:
    """Finish a job."""

    def finish_(store: JobStore, job: Job, **values: Any) -> Result:
        filled = {
            "id": job.id,
            "status": "done",
            "origin": job.origin,
            "name": job.name,
            "received": job.received,
            "finished": time.time(),
            "rows": (ROW,),
        }
        return store.finish(Result(**filled | values))

    return finish_
