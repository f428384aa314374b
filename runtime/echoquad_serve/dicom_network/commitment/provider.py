"""Storage commitment as provider: requests are recorded, and reports sent until the caller has taken them."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pynetdicom import build_role
from pynetdicom.association import Association
from pynetdicom.presentation import build_context

from echoquad_runtime.errors import EchoQuadError
from echoquad_serve.config import TlsConfig
from echoquad_serve.dicom_network.association import Deadline, Peer, associate
from echoquad_serve.dicom_network.commitment.data_sets import (
    ALL_COMMITTED,
    NO_SUCH_INSTANCE,
    NOT_COMMITTED,
    decode_request,
    encode_report,
)
from echoquad_serve.dicom_network.commitment.pending_reports import PendingReport, PendingReports
from echoquad_serve.dicom_network.sop_classes import COMMITMENT, COMMITMENT_INSTANCE, NATIVE_LITTLE_ENDIAN
from echoquad_serve.errors import DeliveryError

__all__ = ["CommitmentProvider"]

_LOGGER: Final = logging.getLogger("echoquad_serve.dicom_network")
_SUCCESS: Final = 0x0000
_PROCESSING_FAILURE: Final = 0x0110
_INVALID_ARGUMENT: Final = 0x0115
_NO_SUCH_ACTION: Final = 0x0123
_RESOURCE_LIMITATION: Final = 0x0213

_MAX_PENDING: Final = 1000
_ATTEMPT_S: Final = 10.0
_SAME_ASSOCIATION_S: Final = 2.0
"""Time for the answer to a report on the association of its request, which the caller may want to release meanwhile."""

_FIRST_RETRY_S: Final = 5.0
_LAST_RETRY_S: Final = 600.0
_ANSWER_FIRST_S: Final = 0.1
"""Wait before a report on the association of its request, so that the answer to the request goes first."""


class CommitmentProvider:
    """Answers requests of storage commitment, and sends the reports.

    A caller whose port is known takes its report on a new association. Any other must wait on the association of its
    request; if it does not, the report is given up, and it must ask again.

    Parameters
    ----------
    folder
        Where pending reports are kept.
    committed
        Whether the object of a SOP instance UID is safely kept.
    ae_title, tls
        Of the node.

    Attributes
    ----------
    attempts
        Number of attempts to send a report.
    """

    def __init__(
        self, folder: Path, committed: Callable[[str], bool], ae_title: str, tls: TlsConfig | None = None
    ) -> None:
        self._committed = committed
        self._ae_title, self._tls = ae_title, tls
        self._pending = PendingReports(folder)
        self._due: dict[str, tuple[float, int, PendingReport]] = {}  # by id: monotonic time, attempts
        self._associations: dict[str, weakref.ref[Association]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self.attempts = 0
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Number of reports that are due."""
        return len(self._due)

    def start(self) -> None:
        """Send what is due, and what will be, in a thread."""
        with self._changed:
            self._closing = False
            self._due = {report.id: (0.0, 0, report) for report in self._pending.load()}
        self._thread = threading.Thread(target=self._run, name="echoquad-dicom-commitment", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; what is still due is sent after the next start."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_ATTEMPT_S)

    def on_action(self, event: Any, host: str, port: int) -> tuple[int, None]:
        """Handle pynetdicom's ``EVT_N_ACTION`` of a caller; return the status of the answer.

        On success the report is on the disk.
        """
        request = event.request
        if request.RequestedSOPInstanceUID != COMMITMENT_INSTANCE or request.ActionTypeID != 1:
            return _NO_SUCH_ACTION, None
        try:
            transaction, instances = decode_request(event.action_information)
        except Exception as error:
            _LOGGER.warning("an invalid request of storage commitment came (%s)", type(error).__name__)
            return _INVALID_ARGUMENT, None
        ae_title = event.assoc.requestor.ae_title.strip()
        report = PendingReport(ae_title, host, port, transaction, tuple(instances))
        with self._changed:
            if len(self._due) >= _MAX_PENDING:
                return _RESOURCE_LIMITATION, None
            try:
                self._pending.add(report)
            except EchoQuadError as error:
                _LOGGER.error("a request of storage commitment cannot be recorded (%s)", error.code)
                return _PROCESSING_FAILURE, None
            self._associations[report.id] = weakref.ref(event.assoc)
            self._due[report.id] = (time.monotonic() + (0.0 if port else _ANSWER_FIRST_S), 0, report)
            self._changed.notify_all()
        return _SUCCESS, None

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing:
                    moment, attempts, report = min(self._due.values(), key=lambda one: one[0], default=(None, 0, None))
                    wait = None if moment is None else moment - time.monotonic()
                    if wait is not None and wait <= 0:
                        break
                    self._changed.wait(wait)
                if self._closing or report is None:
                    return
            try:
                self._send(report)
                done = True
            except Exception as error:
                done = not report.port
                name = error.code if isinstance(error, EchoQuadError) else type(error).__name__
                hint = "; set its port in [[dicom.caller]]" if done else ""
                _LOGGER.warning("%s has not taken a report of storage commitment (%s)%s", report.ae_title, name, hint)
            with self._changed:
                self.attempts += 1
                if done:
                    self._pending.remove(report)
                    self._due.pop(report.id, None)
                    self._associations.pop(report.id, None)
                else:
                    wait = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2**attempts)
                    self._due[report.id] = (time.monotonic() + wait, attempts + 1, report)

    def _send(self, report: PendingReport) -> None:
        """Send a report.

        Raises
        ------
        DeliveryError
            If the caller has not taken it.
        """
        if report.port:
            peer = Peer(report.host, report.port, report.ae_title, self._ae_title, self._tls)
            context = build_context(COMMITMENT, list(NATIVE_LITTLE_ENDIAN))
            role = build_role(COMMITMENT, scu_role=True, scp_role=True)
            with associate(peer, [context], Deadline(_ATTEMPT_S), negotiation=[role]) as association:
                self._report(association, report, _ATTEMPT_S)
            return
        reference = self._associations.get(report.id)
        association = None if reference is None else reference()
        if association is None or not association.is_established:
            raise DeliveryError("the caller has ended the association of its request")
        self._report(association, report, _SAME_ASSOCIATION_S)

    def _report(self, association: Association, report: PendingReport, timeout: float) -> None:
        failures = {uid: NO_SUCH_INSTANCE for _, uid in report.instances if not self._committed(uid)}
        information = encode_report(report.transaction_uid, report.instances, failures)
        kind = NOT_COMMITTED if failures else ALL_COMMITTED
        association.dimse_timeout = timeout
        status, _ = association.send_n_event_report(information, kind, COMMITMENT, COMMITMENT_INSTANCE)
        if status.get("Status") != _SUCCESS:
            raise DeliveryError("the caller has answered a report of storage commitment with a failure")
