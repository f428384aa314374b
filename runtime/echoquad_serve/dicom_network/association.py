"""Associations that this side requests, with one time limit for all that happens on them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from echoquad_runtime.errors import ConfigError, EchoQuadError
from echoquad_serve.config import TlsConfig
from echoquad_serve.dicom_network.connection_guard import PDU_BYTES, guard
from echoquad_serve.dicom_network.library_settings import silence_libraries
from echoquad_serve.dicom_network.tls import client_context
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError

__all__ = ["Deadline", "Peer", "associate"]

_RELEASE_SECONDS: Final = 2.0
"""Time that a peer has to answer a release; what was sent has arrived by then."""

_RELEASE_SLACK_S: Final = 1.0

_REASONS: Final = {
    (1, 2): "the application context is not supported",
    (1, 3): "it does not know the calling AE title; enter it there",
    (1, 7): "it has another AE title; correct ae_title",
    (3, 1): "it is busy",
    (3, 2): "it has too many associations",
}
"""Reasons of a rejection (PS3.8, table 9-21), by source and diagnostic."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A DICOM node to connect to, and the name under which to do so."""

    host: str
    port: int
    ae_title: str
    calling_ae_title: str
    tls: TlsConfig | None = None

    def __str__(self) -> str:
        return f"{self.ae_title} ({self.host}:{self.port})"


class Deadline:
    """A moment until which everything must have happened."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left, at least 0.001: pynetdicom takes 0 for no limit."""
        return max(0.001, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether it has passed."""
        return time.monotonic() >= self._end


@contextmanager
def associate(
    peer: Peer,
    contexts: Sequence[PresentationContext],
    deadline: Deadline,
    *,
    negotiation: Sequence[Any] = (),
    handlers: Sequence[tuple[Any, Callable[[Any], Any]]] = (),
) -> Iterator[Association]:
    """Connect to a peer; release the association at the end of the block, or abort it if the block fails.

    At the deadline the connection is closed, whatever pynetdicom waits for: without that, it waits for ever to send
    to a peer that does not read.

    Parameters
    ----------
    peer, contexts, deadline
        Who, for what, until when.
    negotiation
        Items of extended negotiation.
    handlers
        Events of pynetdicom and what handles them.

    Raises
    ------
    DeliveryError
        If there is no association; a `DeliveryRefusedError` if the peer takes none of the contexts.
    """
    silence_libraries()
    try:
        tls = None if peer.tls is None else (client_context(peer.tls), peer.host)
    except ConfigError as error:  # the files could be used when the service started
        raise DeliveryError(str(error)) from error
    address = _resolve(peer, deadline)
    entity = _Entity(ae_title=peer.calling_ae_title)
    entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = deadline.left()
    errors: list[BaseException] = []
    watchdog = threading.Timer(deadline.left(), entity.cut)
    watchdog.name, watchdog.daemon = "echoquad-dicom-deadline", True
    watchdog.start()
    association = None
    try:
        association = entity.associate(
            address,
            peer.port,
            contexts=list(contexts),
            ae_title=peer.ae_title,
            max_pdu=PDU_BYTES,
            ext_neg=list(negotiation),
            tls_args=tls,
            evt_handlers=[*handlers, (evt.EVT_CONN_OPEN, entity.connected)],
        )
        if not association.is_established:
            if association.rejected_contexts and not association.accepted_contexts:
                raise DeliveryRefusedError(_refusal(peer, association.rejected_contexts))
            raise DeliveryError(_failure(association, peer, deadline, entity))
        try:
            yield association
        except BaseException as error:
            errors.append(error)
            raise
    except EchoQuadError:
        raise
    except Exception as error:  # pynetdicom and pydicom raise many kinds for what a peer sends, with values in them
        raise DeliveryError(f"{peer}: sends what is no valid DICOM message ({type(error).__name__})") from None
    finally:
        if association is not None:
            _end(association, deadline, abort=bool(errors))
        watchdog.cancel()
        entity.close()


class _Entity(AE):  # type: ignore[misc]
    """An application entity whose connections can be cut, also while they are made."""

    def __init__(self, ae_title: str) -> None:
        super().__init__(ae_title)
        self._association: Association | None = None
        self._connection: socket.socket | None = None
        self._created: socket.socket | None = None
        self.was_connected = False

    def _create_socket(self, association: Association, address: Any, tls_args: Any) -> Any:
        created = super()._create_socket(association, address, tls_args)
        association.name = "echoquad-dicom-association"
        association.dul.name, association.dul.daemon = "echoquad-dicom-upper-layer", True
        self._association, self._created = association, created.socket
        return created

    def connected(self, event: Any) -> None:
        """Limit what comes over a new connection."""
        self.was_connected = True
        self._connection = event.assoc.dul.socket.socket
        guard(event.assoc, self.network_timeout)
        self._connection.settimeout(self.network_timeout)

    def cut(self) -> None:
        """End the connection, if there is one."""
        for connection in self._connections():
            with contextlib.suppress(OSError):  # it has ended, or has not begun
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and its thread, and close the socket, which pynetdicom leaves open after some faults."""
        self.cut()
        connections = self._connections()
        if self._association is not None and self._association.dul.is_alive():
            self._association.dul.kill_dul()
            self._association.dul.join(_RELEASE_SECONDS)
        for connection in connections:
            connection.close()

    def _connections(self) -> list[socket.socket]:
        transport = None if self._association is None else self._association.dul.socket
        found = (self._connection, self._created, None if transport is None else transport.socket)
        return [connection for connection in found if connection is not None]


def _end(association: Association, deadline: Deadline, *, abort: bool) -> None:
    association.acse_timeout = min(_RELEASE_SECONDS, deadline.left())
    if association.is_established:
        if abort:
            association.abort()
        else:
            # If the peer leaves at this moment, pynetdicom 3.0.4 waits for its own thread without a time limit.
            watchdog = threading.Timer(_RELEASE_SECONDS + _RELEASE_SLACK_S, association.kill)
            watchdog.name, watchdog.daemon = "echoquad-dicom-release", True
            watchdog.start()
            try:
                association.release()
            finally:
                watchdog.cancel()
    if association.is_alive():
        association.join(_RELEASE_SECONDS)


def _resolve(peer: Peer, deadline: Deadline) -> str:
    """Return an address of a host: the system's look-up, which has time limits of its own, in a thread.

    Raises
    ------
    DeliveryError
        If there is none in time.
    """
    found: list[str] = []

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        entries.sort(key=lambda entry: entry[0] != socket.AF_INET)
        found.extend(str(entry[4][0]) for entry in entries)

    thread = threading.Thread(target=look_up, name="echoquad-dicom-look-up", daemon=True)
    thread.start()
    thread.join(deadline.left())
    if not found:
        raise DeliveryError(f"{peer}: the host name has no address; correct host, or check the name server")
    return found[0]


def _refusal(peer: Peer, contexts: Sequence[PresentationContext]) -> str:
    names = ", ".join(sorted({context.abstract_syntax.name for context in contexts}))
    return f"{peer}: takes no {names}; let it accept this SOP class, or do not send it"


def _failure(association: Association, peer: Peer, deadline: Deadline, entity: _Entity) -> str:
    """Return why there is no association, and what to do."""
    if association.is_rejected:
        answer = association.acceptor.primitive
        reason = _REASONS.get((answer.result_source, answer.diagnostic), "it gives no reason")
        return f"{peer}: rejects the association from {peer.calling_ae_title}: {reason}"
    if not entity.was_connected:
        how = "over TLS " if peer.tls is not None else ""
        return f"{peer}: cannot be reached {how}; check host, port{', certificates' if how else ''} and network"
    if deadline.passed:
        return f"{peer}: does not answer the association request in time"
    return (
        f"{peer}: aborts the association; expected a DICOM node{'' if peer.tls is None else ' with TLS'} at this port"
    )
