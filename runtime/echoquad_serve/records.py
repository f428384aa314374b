"""What travels through the service: an incoming object, the job that it becomes, and the result of the job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

__all__ = [
    "ABSTENTIONS",
    "LOW_CONFIDENCE",
    "UNLIKE_TRAINING_FRAMES",
    "Delivery",
    "Destination",
    "IncomingObject",
    "Job",
    "Origin",
    "Result",
    "Status",
]

Origin = Literal["http", "folder", "dicom", "live"]
"""How an object came."""

Status = Literal["done", "failed", "expired"]
"""How a job ended: with at least one row, with failures alone, or unread since its deadline had passed."""

LOW_CONFIDENCE: Final = "low confidence"
UNLIKE_TRAINING_FRAMES: Final = "unlike the training frames"
ABSTENTIONS: Final = (LOW_CONFIDENCE, UNLIKE_TRAINING_FRAMES)
"""Why a model abstains: the values of ``abstained_because`` in a row, and of the label ``reason`` of the metric."""


@dataclass(frozen=True, slots=True)
class IncomingObject:
    """An object that is offered: a complete file that the store may move.

    Attributes
    ----------
    path
        The file, within the store's folder for incoming files.
    origin
        How it came.
    name
        Name for rows and pages; never a value of a DICOM header.
    key
        Identifies a repeated offer of the same object, which becomes no second job; empty if each offer is new.
    sender
        Application entity title or address of the sender.
    sop_class_uid, sop_instance_uid
        Of a DICOM object; empty for any other.
    deadline
        Unix time after which a result is of no use any more; None for none.
    """

    path: Path
    origin: Origin
    name: str
    key: str = ""
    sender: str = ""
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """An accepted object, which is on the disk and waits for its result.

    Attributes
    ----------
    id
        32 hexadecimal digits, random.
    path
        The object's file in the spool.
    received
        Unix time of acceptance.
    origin, name, sender, sop_class_uid, sop_instance_uid, deadline
        As those of the `IncomingObject`.
    interrupted
        How often the service has crashed while it decided the job, possibly because of it.
    """

    id: str
    path: Path
    received: float
    origin: Origin
    name: str
    sender: str = ""
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    deadline: float | None = None
    interrupted: int = 0

    def expired(self, now: float) -> bool:
        """Return whether the deadline has passed at the Unix time `now`: the job ends unread, as ``expired``."""
        return self.deadline is not None and now >= self.deadline


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a job. Every job has exactly one.

    Attributes
    ----------
    id
        The job's.
    number
        Position in the order of all results, from 1; 0 before the store has recorded it.
    status
        How the job ended.
    origin, name, sender, sop_class_uid, sop_instance_uid, received
        Those of the job.
    finished
        Unix time of the end.
    rows
        The decisions, one for each frame, as the JSON lines of `echoquad predict`.
    failures
        ``file``, ``code`` and ``message`` of each frame, or of the object, that could not be decided.
    bundle
        ``name``, ``sha256`` and ``contract_hash`` of the bundle that decided; empty if none did.
    timings_ms
        Milliseconds by stage: ``queue`` and ``predict``.
    shadow
        What a second bundle decided, as `rows`, if one decides beside the first.
    """

    id: str
    status: Status
    origin: Origin
    name: str
    received: float
    finished: float
    rows: tuple[dict[str, Any], ...] = ()
    failures: tuple[dict[str, str], ...] = ()
    bundle: dict[str, str] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)
    sender: str = ""
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    shadow: tuple[dict[str, Any], ...] = ()
    number: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values, as the API shows it: without sender, UIDs and the shadow's decisions."""
        keys = ("id", "number", "status", "origin", "name", "received", "finished", "bundle", "timings_ms")
        values = {key: getattr(self, key) for key in keys}
        return {**values, "rows": list(self.rows), "failures": list(self.failures)}

    def to_delivered_dict(self) -> dict[str, Any]:
        """Return the result as folders and webhooks get it: with the UIDs, by which a receiver finds the study."""
        uids = {"sop_class_uid": self.sop_class_uid, "sop_instance_uid": self.sop_instance_uid}
        return self.to_dict() | (uids if self.sop_instance_uid else {})


@dataclass(frozen=True, slots=True)
class Delivery:
    """A result on its way to a destination.

    Attributes
    ----------
    result
        The result.
    source
        The object's file in the spool; None if it is not kept.
    attempts
        How often it was sent without success.
    """

    result: Result
    source: Path | None
    attempts: int = 0


class Destination(Protocol):
    """Where results go. A repeated delivery of a result has the same effect as one.

    Attributes
    ----------
    name
        Unique, from the configuration.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    def deliver(self, delivery: Delivery) -> None:
        """Deliver a result, and return once the destination has it for good.

        Raises
        ------
        DeliveryError
            If it has not arrived; a `DeliveryRefusedError` if it never will.
        """
        ...

    def close(self) -> None:
        """Release connections and threads."""
        ...
