"""Data sets of storage commitment (PS3.4, annex J): a request, and the report that answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from pydicom.dataset import Dataset

from echoquad_runtime.frames.sop_uids import is_uid

__all__ = [
    "ALL_COMMITTED",
    "NOT_COMMITTED",
    "NO_SUCH_INSTANCE",
    "decode_report",
    "decode_request",
    "encode_report",
    "encode_request",
]

ALL_COMMITTED: Final = 1
"""Event type of a report without failures."""

NOT_COMMITTED: Final = 2
"""Event type of a report with failures."""

NO_SUCH_INSTANCE: Final = 0x0112

Instances = Sequence[tuple[str, str]]
"""SOP class and instance UIDs of objects."""


def encode_request(transaction_uid: str, instances: Instances) -> Dataset:
    """Return the action information of a request."""
    request = Dataset()
    request.TransactionUID = transaction_uid
    request.ReferencedSOPSequence = [_item(*instance) for instance in instances]
    return request


def decode_request(request: Dataset) -> tuple[str, Instances]:
    """Return the transaction UID of a request, and the SOP class and instance UIDs of its objects.

    Raises
    ------
    ValueError
        If a UID is missing or is none, or there are no objects.
    """
    transaction, instances = str(request.get("TransactionUID", "")), _instances(request, "ReferencedSOPSequence")
    if not is_uid(transaction) or not instances:
        raise ValueError("a request of storage commitment without a transaction UID, or without objects")
    return transaction, instances


def encode_report(transaction_uid: str, instances: Instances, failures: Mapping[str, int]) -> Dataset:
    """Return the event information of a report; `failures` has the reason of each instance that is not committed."""
    report = Dataset()
    report.TransactionUID = transaction_uid
    # An empty sequence must not be there.
    if committed := [_item(*instance) for instance in instances if instance[1] not in failures]:
        report.ReferencedSOPSequence = committed
    failed = []
    for sop_class, instance in instances:
        if instance in failures:
            item = _item(sop_class, instance)
            item.FailureReason = failures[instance]
            failed.append(item)
    if failed:
        report.FailedSOPSequence = failed
    return report


def decode_report(report: Dataset) -> tuple[str, set[str], dict[str, int]]:
    """Return the transaction UID of a report, the instances that are committed, and the reasons of the others.

    Raises
    ------
    ValueError
        If a UID is missing or is none.
    """
    transaction = str(report.get("TransactionUID", ""))
    if not is_uid(transaction):
        raise ValueError("a report of storage commitment without a transaction UID")
    failed = {
        str(item.get("ReferencedSOPInstanceUID", "")): int(item.get("FailureReason") or 0)
        for item in report.get("FailedSOPSequence") or ()
    }
    committed = {instance for _, instance in _instances(report, "ReferencedSOPSequence")}
    return transaction, committed - failed.keys(), failed


def _instances(data: Dataset, sequence: str) -> list[tuple[str, str]]:
    instances = [
        (str(item.get("ReferencedSOPClassUID", "")), str(item.get("ReferencedSOPInstanceUID", "")))
        for item in data.get(sequence) or ()
    ]
    if not all(is_uid(uid) for instance in instances for uid in instance):
        raise ValueError("an object of storage commitment without valid UIDs")
    return instances


def _item(sop_class: str, instance: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class
    item.ReferencedSOPInstanceUID = instance
    return item
