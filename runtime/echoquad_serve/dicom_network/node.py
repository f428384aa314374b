"""The DICOM node: C-ECHO, C-STORE and storage commitment as provider (SCP)."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.association import Association

from echoquad_runtime.errors import ConfigError
from echoquad_runtime.frames.sop_uids import is_uid
from echoquad_serve.config import Caller, DicomNodeConfig
from echoquad_serve.dicom_network.callers import CallerList, check_ae_title
from echoquad_serve.dicom_network.commitment.provider import CommitmentProvider
from echoquad_serve.dicom_network.commitment.reports import CommitmentReports
from echoquad_serve.dicom_network.connection_guard import PDU_BYTES
from echoquad_serve.dicom_network.library_settings import silence_libraries
from echoquad_serve.dicom_network.message_receiver import MessageReceiver
from echoquad_serve.dicom_network.received_file import ReceivedFile, ReceivedTooLargeError, remove_leftovers
from echoquad_serve.dicom_network.server import AssociationListener, ListenerLimits
from echoquad_serve.dicom_network.sop_classes import node_contexts
from echoquad_serve.dicom_network.tls import server_context
from echoquad_serve.errors import IntakeError
from echoquad_serve.records import IncomingObject, Job

__all__ = ["DicomNode"]

_LOGGER: Final = logging.getLogger("echoquad_serve.dicom_network")

_SUCCESS: Final = 0x0000
_PROCESSING_FAILURE: Final = 0x0110
_OUT_OF_RESOURCES: Final = 0xA700
_CLASS_MISMATCH: Final = 0xA900
_CANNOT_UNDERSTAND: Final = 0xC000
_TOO_LARGE: Final = 0xC001

_CLOSE_SECONDS: Final = 5.0

# Result, source and diagnostic of a rejection (PS3.8, table 9-21).
_UNKNOWN_CALLER: Final = (1, 1, 3)
_OTHER_TITLE: Final = (1, 1, 7)
_TOO_MANY: Final = (2, 3, 2)


class DicomNode:
    """Receives objects over the DICOM network, and hands each over as a complete file.

    Parameters
    ----------
    config
        The table ``[dicom]``.
    accept
        Takes an object over: on return it is on the disk and in the queue. Raises an `IntakeError` to refuse it.
    incoming
        Folder for files that are being received.
    check_room
        Raises an `IntakeError` if there is no room for so many bytes more.
    committed
        Whether the object of a SOP instance UID is safely kept; None offers no storage commitment.
    state
        Folder for what must survive a restart: pending reports of storage commitment. Needed with `committed`.

    Attributes
    ----------
    reports
        Takes the reports of archives that a `StoreClient` has asked for commitment.

    Raises
    ------
    ConfigError
        If the configuration has an AE title, an address or a certificate that cannot be used.
    """

    def __init__(
        self,
        config: DicomNodeConfig,
        accept: Callable[[IncomingObject], Job],
        incoming: Path,
        check_room: Callable[[int], None],
        *,
        committed: Callable[[str], bool] | None = None,
        state: Path | None = None,
    ) -> None:
        self._config, self._accept, self._incoming, self._check_room = config, accept, incoming, check_room
        self._ae_title = check_ae_title(config.ae_title, "dicom.ae_title")
        self._callers = CallerList(config.caller)
        self._tls = None if config.tls is None else server_context(config.tls)
        self.reports = CommitmentReports()
        self._commitment: CommitmentProvider | None = None
        if committed is not None and state is not None:
            self._commitment = CommitmentProvider(state, committed, self._ae_title, config.tls)
        self._listener: AssociationListener | None = None
        self._admitted: dict[Association, Caller] = {}
        self._counts: Counter[str] = Counter()
        self._last_received: float | None = None
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        """The port that the node listens on; that of the configuration, unless that is 0."""
        return self._config.port if self._listener is None else int(self._listener.server_address[1])

    def start(self) -> None:
        """Listen, in threads.

        Raises
        ------
        ConfigError
            If the address cannot be listened on.
        """
        silence_libraries()
        if count := remove_leftovers(self._incoming):
            _LOGGER.info("%d objects that were not completely received are removed; their senders keep them", count)
        config = self._config
        entity = AE(ae_title=self._ae_title)
        entity.require_called_aet = True
        entity.maximum_pdu_size = PDU_BYTES
        entity.maximum_associations = 10_000  # the node has its own limit, which silent connections do not count for
        entity.acse_timeout = config.acse_timeout_s
        entity.network_timeout = entity.dimse_timeout = config.network_timeout_s
        limits = ListenerLimits(
            config.acse_timeout_s, config.network_timeout_s, self._callers.admits_address, self._prepare
        )
        handlers = [
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_N_EVENT_REPORT, self.reports.on_event_report),
            (evt.EVT_N_ACTION, self._on_action),
        ]
        try:
            self._listener = entity.make_server(
                (config.host, config.port),
                contexts=node_contexts(),
                ssl_context=self._tls,
                evt_handlers=handlers,
                server_class=AssociationListener,
                limits=limits,
            )
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(
                f"dicom: cannot listen on {config.host}:{config.port} ({reason}); choose a free port of this machine"
            ) from error
        if self._commitment is not None:
            self._commitment.start()
        self._listener.start()

    def close(self) -> None:
        """Stop listening and end all associations; an object whose store was not answered is sent again later."""
        if self._listener is not None:
            self._listener.close(_CLOSE_SECONDS)
        if self._commitment is not None:
            self._commitment.close()

    def status(self) -> dict[str, Any]:
        """Return the node's address, its associations, and the numbers of objects and connections since the start."""
        listener = self._listener
        with self._lock:
            counts = dict(self._counts)
            associations = len(self._admitted)
            last = self._last_received
        return {
            "ae_title": self._ae_title,
            "host": self._config.host,
            "port": self.port,
            "tls": self._tls is not None,
            "listening": listener is not None and listener.listening,
            "associations": associations,
            "received": counts.get("received", 0),
            "refused": counts.get("refused", 0),
            "invalid": counts.get("invalid", 0),
            "rejected_associations": counts.get("rejected", 0),
            "refused_connections": 0 if listener is None else listener.refused,
            "last_received": last,
            "pending_reports": 0 if self._commitment is None else self._commitment.waiting,
        }

    def _prepare(self, association: Association) -> Callable[[], None]:
        """Attach a receiver to a new association; return what removes what the association leaves."""
        receiver = MessageReceiver(association, self._incoming, self._check_room)
        association.dimse = receiver

        def finish() -> None:
            receiver.remove_files()
            with self._lock:
                self._admitted.pop(association, None)

        return finish

    def _on_requested(self, event: Any) -> None:
        """Reject an association whose AE titles or address are not on the list, or that is one too many."""
        association: Association = event.assoc
        request = association.requestor.primitive
        address, calling = association.requestor.address, str(request.calling_ae_title).strip()
        caller = self._callers.find(calling, address)
        rejection = None
        with self._lock:
            if str(request.called_ae_title).strip() != self._ae_title:
                rejection = _OTHER_TITLE
            elif caller is None:
                rejection = _UNKNOWN_CALLER
            elif len(self._admitted) >= self._config.max_associations:
                rejection = _TOO_MANY
            else:
                self._admitted[association] = caller
            self._counts["rejected"] += rejection is not None
        if rejection is None:
            event.assoc._server.established(association.dul.socket.socket)
            return
        reason = {
            _OTHER_TITLE: "it calls the node by another AE title",
            _UNKNOWN_CALLER: "no [[dicom.caller]] has this AE title and address",
            _TOO_MANY: "max_associations are open",
        }[rejection]
        _LOGGER.warning("an association of %r at %s is rejected: %s", calling, address, reason)
        association.acse.send_reject(*rejection)
        association.kill()  # returns once the rejection was sent

    def _on_echo(self, event: Any) -> int:
        with self._lock:
            self._counts["echoes"] += 1
        return _SUCCESS

    def _on_action(self, event: Any) -> tuple[int, None]:
        if self._commitment is None:
            return _PROCESSING_FAILURE, None
        caller = self._admitted[event.assoc]
        return self._commitment.on_action(event, event.assoc.requestor.address, caller.port)

    def _on_store(self, event: Any) -> int | Dataset:
        """Accept an object; the answer is a success only after `accept` has returned."""
        file: ReceivedFile | None = event.request._dataset_file
        try:
            status, comment = self._store(event, file)
        except IntakeError as error:
            status, comment = _OUT_OF_RESOURCES, error.code
        except Exception:
            _LOGGER.exception("an object that was received cannot be accepted")
            status, comment = _PROCESSING_FAILURE, "internal error"
        if file is not None:
            file.remove()
        with self._lock:
            self._counts["received" if status == _SUCCESS else "refused" if status < 0xA900 else "invalid"] += 1
            if status == _SUCCESS:
                self._last_received = time.time()
        if status == _SUCCESS:
            return status
        _LOGGER.warning("an object of %s is not accepted: status 0x%04X, %s", _title(event), status, comment)
        answer = Dataset()
        answer.Status, answer.ErrorComment = status, comment
        return answer

    def _store(self, event: Any, file: ReceivedFile | None) -> tuple[int, str]:
        request = event.request
        uids = str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID)
        if not all(map(is_uid, uids)):
            return _CANNOT_UNDERSTAND, "invalid SOP class or instance UID"
        if uids[0] != event.context.abstract_syntax:
            return _CLASS_MISMATCH, "SOP class is not that of the presentation context"
        if file is None or not file.size:
            return _CANNOT_UNDERSTAND, "no data set"
        try:
            file.finish()
        except ReceivedTooLargeError:
            return _TOO_LARGE, "the data set is too large"
        title = _title(event)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self._accept(
            IncomingObject(
                path=file.path,
                origin="dicom",
                name=f"{re.sub(r'[^A-Za-z0-9_.-]', '_', title)}-{stamp}-{file.path.stem[-6:]}.dcm",
                key=f"dicom:{uids[1]}:{file.sha256}",
                sender=title,
                sop_class_uid=uids[0],
                sop_instance_uid=uids[1],
            )
        )
        return _SUCCESS, ""


def _title(event: Any) -> str:
    return str(event.assoc.requestor.ae_title).strip()
