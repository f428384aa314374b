"""The queue and the store in numbers: nothing that names an object is read."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final

__all__ = ["queue_status"]

_DATABASE: Final = "queue.sqlite3"
_FOLDERS: Final = ("incoming", "spool", "unclaimed", "audit")
_ATTEMPTS: Final = 3
_COUNTS: Final = {
    "jobs": "SELECT count(*) FROM jobs",
    "jobs_waiting": "SELECT count(*) FROM jobs WHERE done = 0",
    "jobs_interrupted": "SELECT count(*) FROM jobs WHERE interrupted > 0",
    "jobs_past_their_deadline": "SELECT count(*) FROM jobs WHERE done = 0 AND deadline < :now",
    "oldest_waiting_s": "SELECT coalesce(round(:now - min(received)), 0) FROM jobs WHERE done = 0",
    "results": "SELECT count(*) FROM results",
    "results_not_delivered_everywhere": "SELECT count(*) FROM results WHERE settled IS NULL",
    "deliveries_waiting": "SELECT count(*) FROM deliveries WHERE refused = 0",
    "deliveries_refused": "SELECT count(*) FROM deliveries WHERE refused > 0",
    "most_attempts": "SELECT coalesce(max(attempts), 0) FROM deliveries",
}


def queue_status(store: Path | None) -> dict[str, Any]:
    """Return counts of jobs, results and deliveries, and of the files in the store's folders.

    The service locks its database. So it is read without locks, and never written: if the service writes meanwhile, a
    count may be one off.

    Parameters
    ----------
    store
        The store's folder; None if it is not known.
    """
    if store is None:
        return {"store": "not known"}
    try:
        store.stat()
    except OSError as error:
        return {"store": os.strerror(error.errno or 0)}
    return {
        "store": "found",
        "queue": _counts(store / _DATABASE),
        "folders": {name: _folder_size(store / name) for name in _FOLDERS},
    }


def _counts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"database": "missing"}
    problem = ""
    for attempt in range(_ATTEMPTS):
        time.sleep(0.1 * attempt)
        try:
            address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
            with closing(sqlite3.connect(address, uri=True, timeout=0)) as connection:
                run, now = connection.execute, {"now": time.time()}
                version = int(run("PRAGMA user_version").fetchone()[0])
                counts = {name: int(run(query, now).fetchone()[0]) for name, query in _COUNTS.items()}
            return {"database": "read", "schema": version, "bytes": path.stat().st_size, **counts}
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            problem = type(error).__name__
    return {"database": "cannot be read", "reason": problem}


def _folder_size(folder: Path) -> dict[str, int] | str:
    """Return number and bytes of the files in a folder, without its sub-folders."""
    try:
        with os.scandir(folder) as entries:
            sizes = [entry.stat().st_size for entry in entries if entry.is_file(follow_symlinks=False)]
    except OSError as error:
        return os.strerror(error.errno or 0)
    return {"files": len(sizes), "bytes": sum(sizes)}
