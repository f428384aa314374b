"""Rows of the database, and the records that they hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from echoquad_serve.records import IncomingObject, Job, Result

__all__ = ["JOB_COLUMNS", "RESULT_COLUMNS", "about", "body", "job_of", "key_digest", "result_of"]

JOB_COLUMNS: Final = (
    "jobs.id, jobs.file, jobs.received, jobs.deadline, jobs.interrupted, jobs.sop_instance_uid, jobs.about"
)
"""What `job_of` takes."""

RESULT_COLUMNS: Final = (
    "jobs.id, results.number, jobs.received, results.finished, jobs.sop_instance_uid, jobs.about, results.body"
)
"""What `result_of` takes."""

_BODY: Final = ("status", "rows", "failures", "bundle", "timings_ms", "shadow")


def about(incoming: IncomingObject) -> str:
    """Return the columns of an object that no query needs, as JSON."""
    names = ("origin", "name", "sender", "sop_class_uid")
    return _json({name: getattr(incoming, name) for name in names})


def body(result: Result) -> str:
    """Return what a result adds to its job, as JSON.

    Raises
    ------
    TypeError
        If a row holds a value that is not of JSON.
    """
    return _json({name: getattr(result, name) for name in _BODY})


def job_of(row: tuple[Any, ...], folder: Path) -> Job:
    """Return the job of a row of `JOB_COLUMNS`, whose file is in `folder`."""
    identifier, file, received, deadline, interrupted, sop_instance_uid, text = row
    return Job(
        id=identifier,
        path=folder / file,
        received=received,
        deadline=deadline,
        interrupted=interrupted,
        sop_instance_uid=sop_instance_uid,
        **json.loads(text),
    )


def result_of(row: tuple[Any, ...]) -> Result:
    """Return the result of a row of `RESULT_COLUMNS`."""
    identifier, number, received, finished, sop_instance_uid, job_text, text = row
    values = json.loads(text)
    for name in ("rows", "failures", "shadow"):
        values[name] = tuple(values[name])
    return Result(
        id=identifier,
        number=number,
        received=received,
        finished=finished,
        sop_instance_uid=sop_instance_uid,
        **json.loads(job_text),
        **values,
    )


def key_digest(incoming: IncomingObject) -> bytes | None:
    """Return what identifies a repeated offer: the digest of origin and key, since a key may have any length and text.

    None stands for an object without a key.
    """
    if not incoming.key:
        return None
    text = f"{incoming.origin}\0{incoming.key}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _json(value: dict[str, Any]) -> str:
    # ASCII, since a file name that is not UTF-8 has lone surrogates, which SQLite does not take.
    return json.dumps(value, separators=(",", ":"))
