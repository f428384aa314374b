"""Reports of storage commitment that archives send: on the association of the request, or to the node."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

from pydicom.uid import generate_uid

from echoquad_serve.dicom_network.commitment.data_sets import decode_report

__all__ = ["CommitmentReports", "Report"]

_LOGGER: Final = logging.getLogger("echoquad_serve.dicom_network")
_MAX_TRANSACTIONS: Final = 10_000
_SUCCESS: Final = 0x0000
_INVALID_ARGUMENT: Final = 0x0115


@dataclass(frozen=True, slots=True)
class Report:
    """An archive's answer: the SOP instances that it keeps, and the reasons of those that it does not."""

    committed: frozenset[str]
    failed: dict[str, int] = field(default_factory=dict)


class CommitmentReports:
    """What archives were asked, and what they answered; safe for threads.

    One object is shared by the node, which takes reports, and the clients, which wait for them. A report that comes
    after its client has given up counts at the next attempt.
    """

    def __init__(self) -> None:
        self._reports: OrderedDict[str, Report | None] = OrderedDict()  # by transaction UID
        self._committed: OrderedDict[tuple[str, str], None] = OrderedDict()  # archive and SOP instance UID
        self._archives: dict[str, str] = {}  # of transaction UIDs
        self._changed = threading.Condition()

    def open_transaction(self, archive: str) -> str:
        """Return the UID of a new transaction with an archive, whose report is expected from now on."""
        transaction = str(generate_uid(prefix=None))  # random, so that nobody can guess it
        with self._changed:
            self._reports[transaction] = None
            self._archives[transaction] = archive
            while len(self._reports) > _MAX_TRANSACTIONS:
                oldest, _ = self._reports.popitem(last=False)
                del self._archives[oldest]
        return transaction

    def wait(self, transaction: str, timeout: float) -> Report | None:
        """Return the report of a transaction; None if there is none after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._reports.get(transaction) is not None, timeout)
            return self._reports.get(transaction)

    def are_committed(self, archive: str, instances: Collection[str]) -> bool:
        """Return whether an archive has reported that it keeps all these SOP instances."""
        with self._changed:
            return all((archive, instance) in self._committed for instance in instances)

    def receive(self, transaction: str, report: Report) -> bool:
        """Take a report; return whether its transaction is known."""
        with self._changed:
            if transaction not in self._reports:
                return False
            self._reports[transaction] = report
            for instance in report.committed:
                self._committed[self._archives[transaction], instance] = None
            while len(self._committed) > _MAX_TRANSACTIONS:
                self._committed.popitem(last=False)
            self._changed.notify_all()
            return True

    def on_event_report(self, event: Any) -> tuple[int, None]:
        """Handle pynetdicom's ``EVT_N_EVENT_REPORT``; return the status of the answer."""
        try:
            transaction, committed, failed = decode_report(event.event_information)
        except Exception as error:
            _LOGGER.warning("an invalid report of storage commitment came (%s)", type(error).__name__)
            return _INVALID_ARGUMENT, None
        if not self.receive(transaction, Report(frozenset(committed), failed)):
            # The service was started anew since, and asks again. The archive need not repeat the report.
            _LOGGER.info("a report of storage commitment came that nobody waits for")
        return _SUCCESS, None
