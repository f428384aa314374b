"""Sending objects to an archive: C-STORE, then storage commitment if it is wanted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Final

from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from echoquad_runtime.errors import ConfigError
from echoquad_serve.config import TlsConfig
from echoquad_serve.dicom_network.association import Deadline, Peer, associate
from echoquad_serve.dicom_network.callers import check_ae_title
from echoquad_serve.dicom_network.commitment.data_sets import encode_request
from echoquad_serve.dicom_network.commitment.reports import CommitmentReports, Report
from echoquad_serve.dicom_network.sop_classes import COMMITMENT, COMMITMENT_INSTANCE, NATIVE_LITTLE_ENDIAN, VERIFICATION
from echoquad_serve.dicom_network.tls import client_context
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError

__all__ = ["StoreClient"]

_LOGGER: Final = logging.getLogger("echoquad_serve.dicom_network")
_DUPLICATE: Final = 0x0111
"""The archive has an object of this SOP instance UID; as EchoQuad's UIDs follow from the content, it is this one."""

_POLL_S: Final = 0.2


class StoreClient:
    """Stores DICOM objects at an archive. A repeated call has the effect of one.

    Parameters
    ----------
    host, port, ae_title
        The archive.
    calling_ae_title
        What this side calls itself. An archive sends its reports of storage commitment to the address that it has for
        this title: it should be the AE title, and the address, of the node.
    tls
        Certificates; None for none.
    timeout_s
        Seconds for one call of `send`, all in all.
    commitment
        Whether the archive must confirm that it keeps the objects (storage commitment).
    reports
        Where reports arrive that come on a new association: `DicomNode.reports`. Without, only a report on the
        association of the request arrives.

    Raises
    ------
    ConfigError
        If a value or a TLS file cannot be used.
    """

    def __init__(
        self,
        host: str,
        port: int,
        ae_title: str,
        calling_ae_title: str = "ECHOQUAD",
        tls: TlsConfig | None = None,
        timeout_s: float = 30.0,
        commitment: bool = False,
        reports: CommitmentReports | None = None,
    ) -> None:
        called, calling = (check_ae_title(title, "destination") for title in (ae_title, calling_ae_title))
        if not host or not 0 < port <= 65535 or timeout_s <= 0:
            raise ConfigError(
                f"destination: host is {host!r}, port {port}, timeout_s {timeout_s}; "
                "expected a name or an address, 1 to 65535, and more than 0"
            )
        if tls is not None:
            client_context(tls)  # each connection reads the files anew, since certificates are renewed
        self._peer = Peer(host, port, called, calling, tls)
        self._timeout = timeout_s
        self._commitment = commitment
        self._shared = reports is not None
        self._reports = reports or CommitmentReports()

    def echo(self) -> None:
        """Ask the archive whether it is there (C-ECHO).

        Raises
        ------
        DeliveryError
            If it is not.
        """
        deadline = Deadline(self._timeout)
        with associate(self._peer, [build_context(VERIFICATION)], deadline) as association:
            association.dimse_timeout = deadline.left()
            if association.send_c_echo().get("Status") != 0x0000:
                raise DeliveryError(f"{self._peer}: does not answer C-ECHO")

    def send(self, datasets: Sequence[bytes | Path]) -> None:
        """Store DICOM files (PS3.10); on return the archive has them all.

        Raises
        ------
        DeliveryError
            If it has not: no connection, no answer in time, no resources, not committed.
        DeliveryRefusedError
            If it refuses an object for good: its SOP class, or its content.
        """
        deadline = Deadline(self._timeout)
        objects = [_read(data) for data in datasets]
        if not objects:
            return
        instances = [(str(one.SOPClassUID), str(one.SOPInstanceUID)) for one in objects]
        uids = {uid for _, uid in instances}
        archive = self._peer.ae_title
        if self._commitment and self._reports.are_committed(archive, uids):
            return  # its report came after the last attempt
        contexts = _contexts(objects)
        if self._commitment:
            contexts.append(build_context(COMMITMENT, list(NATIVE_LITTLE_ENDIAN)))
        handlers = [(evt.EVT_N_EVENT_REPORT, self._reports.on_event_report)]
        with associate(self._peer, contexts, deadline, handlers=handlers) as association:
            self._store_all(association, objects, deadline)
            if not self._commitment:
                return
            transaction = self._request_commitment(association, instances, deadline)
            # Archives send the report at once on this association, or on a new one, now or much later.
            report = self._reports.wait(transaction, min(_POLL_S, deadline.left()))
            while report is None and association.is_established and not deadline.passed:
                report = self._reports.wait(transaction, min(_POLL_S, deadline.left()))
        if report is None and self._shared:
            report = self._reports.wait(transaction, deadline.left())
        self._check(report, uids)

    def _store_all(self, association: Association, objects: Sequence[Dataset], deadline: Deadline) -> None:
        """Store objects one after another; a refused one does not keep the others back."""
        refusal: DeliveryRefusedError | None = None
        for number, data in enumerate(objects, 1):
            try:
                self._store(association, data, number, deadline)
            except DeliveryRefusedError as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal

    def _store(self, association: Association, data: Dataset, number: int, deadline: Deadline) -> None:
        kind = data.SOPClassUID.name
        if not association.is_established:
            raise DeliveryError(f"{self._peer}: has ended the association before it had {kind}")
        association.dimse_timeout = deadline.left()
        try:
            answer = association.send_c_store(data, msg_id=number)
        except ValueError as error:
            raise DeliveryRefusedError(
                f"{self._peer}: takes no {kind} in {data.file_meta.TransferSyntaxUID.name}; "
                "let it accept this SOP class and transfer syntax, or do not send it"
            ) from error
        except RuntimeError as error:  # it has ended in the meantime
            raise DeliveryError(f"{self._peer}: has ended the association before it had {kind}") from error
        status = answer.get("Status")
        if status is None:
            how = "does not answer in time" if deadline.passed else "has cut the connection"
            raise DeliveryError(f"{self._peer}: {how} while it stores {kind}")
        if status in {0x0000, _DUPLICATE} or 0xB000 <= status <= 0xBFFF:
            return
        if 0xA900 <= status <= 0xA9FF or 0xC000 <= status <= 0xCFFF:
            raise DeliveryRefusedError(
                f"{self._peer}: refuses {kind} with status 0x{status:04X}; see the archive's log for what it expects"
            )
        raise DeliveryError(f"{self._peer}: cannot store {kind} now, status 0x{status:04X}; see the archive's log")

    def _request_commitment(
        self, association: Association, instances: Sequence[tuple[str, str]], deadline: Deadline
    ) -> str:
        """Ask for storage commitment; return the transaction UID."""
        transaction = self._reports.open_transaction(self._peer.ae_title)
        association.dimse_timeout = deadline.left()
        try:
            answer, _ = association.send_n_action(
                encode_request(transaction, instances), 1, COMMITMENT, COMMITMENT_INSTANCE
            )
        except ValueError as error:
            raise DeliveryError(
                f"{self._peer}: offers no storage commitment; let it do so, or set commitment = false"
            ) from error
        except RuntimeError as error:
            raise DeliveryError(f"{self._peer}: has ended the association before the storage commitment") from error
        status = answer.get("Status")
        if status != 0x0000:
            what = "no answer" if status is None else f"status 0x{status:04X}"
            raise DeliveryError(f"{self._peer}: takes no request of storage commitment ({what})")
        return transaction

    def _check(self, report: Report | None, uids: set[str]) -> None:
        if report is None:
            how = (
                f"let it send reports for {self._peer.calling_ae_title} to the DICOM node, and list it as a caller"
                if self._shared
                else "configure [dicom], to which it can send reports"
            )
            raise DeliveryError(f"{self._peer}: no report of storage commitment came in time; {how}")
        if missing := uids - report.committed:
            reasons = sorted({f"0x{report.failed.get(uid, 0):04X}" for uid in missing})
            raise DeliveryError(
                f"{self._peer}: does not commit {len(missing)} of {len(uids)} objects ({', '.join(reasons)}); "
                "see the archive's log"
            )


def _read(data: bytes | Path) -> Dataset:
    """Return a DICOM file that EchoQuad has made.

    Raises
    ------
    DeliveryRefusedError
        If it is none.
    """
    try:
        read = dcmread(BytesIO(data) if isinstance(data, bytes) else data)
        _ = read.SOPClassUID.name, read.SOPInstanceUID, read.file_meta.TransferSyntaxUID.name
        return read
    except Exception as error:
        raise DeliveryRefusedError(
            f"the object is no DICOM file that can be sent ({type(error).__name__}); report this as a fault"
        ) from error


def _contexts(objects: Sequence[Dataset]) -> list[PresentationContext]:
    """Return a presentation context for each SOP class and kind of transfer syntax.

    Uncompressed data may go in either native syntax; pynetdicom converts them.
    """
    wanted: dict[tuple[str, tuple[str, ...]], None] = {}
    for one in objects:
        syntax = str(one.file_meta.TransferSyntaxUID)
        wanted[str(one.SOPClassUID), NATIVE_LITTLE_ENDIAN if syntax in NATIVE_LITTLE_ENDIAN else (syntax,)] = None
    return [build_context(sop_class, list(syntaxes)) for sop_class, syntaxes in wanted]
