"""Exceptions of the service.

::

    EchoQuadError
    ├── IntakeError (RuntimeError)          an object is not accepted; the sender keeps it
    │   ├── QueueFullError
    │   └── StorageFullError (OSError)
    ├── AuditLogError (ValueError)  3       an audit log was changed, or is incomplete
    ├── DeliveryError (RuntimeError)        a result has not reached a destination; it is sent again
    │   └── DeliveryRefusedError            it is not sent again: the same object would be refused again
    ├── StoreError (RuntimeError)           the queue's folder or database cannot be used
    └── LiveSourceError (OSError)           a live source cannot be opened, or has ended; it is opened again
"""

from __future__ import annotations

from echoquad_runtime.errors import EchoQuadError

__all__ = [
    "AuditLogError",
    "DeliveryError",
    "DeliveryRefusedError",
    "IntakeError",
    "LiveSourceError",
    "QueueFullError",
    "StorageFullError",
    "StoreError",
]


class IntakeError(EchoQuadError, RuntimeError):
    """An object is not accepted: nothing of it is kept, and the sender may try again.

    Attributes
    ----------
    retry_after
        Seconds after which another attempt makes sense.
    """

    code = "E_INTAKE"

    def __init__(self, message: str, retry_after: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFullError(IntakeError):
    """As many objects wait as the queue may hold."""

    code = "E_QUEUE_FULL"


class StorageFullError(IntakeError, OSError):
    """The disk has less free space than intake needs."""

    code = "E_STORAGE_FULL"


class DeliveryError(EchoQuadError, RuntimeError):
    """A result has not reached a destination. The outbox sends it again later.

    Attributes
    ----------
    retry_after
        Seconds for which the destination asks not to be tried again; None if it names none.
    """

    code = "E_DELIVERY"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeliveryRefusedError(DeliveryError):
    """A destination refuses a result for good: the outbox keeps it, and reports it until somebody acts."""

    code = "E_DELIVERY_REFUSED"


class StoreError(EchoQuadError, RuntimeError):
    """The queue's folder or database cannot be used: another service holds it, or it is damaged or newer."""

    code = "E_STORE"


class LiveSourceError(EchoQuadError, OSError):
    """A live source cannot be opened, or has ended. It is opened again after a while."""

    code = "E_LIVE_SOURCE"


class AuditLogError(EchoQuadError, ValueError):
    """An audit log was changed, or entries of it are missing."""

    code = "E_AUDIT_LOG"
    exit_code = 3
