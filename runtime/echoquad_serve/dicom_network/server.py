"""The listener: who may connect, how many at a time, and for how long without a word."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from socketserver import BaseServer
from typing import Any, Final

from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from echoquad_serve.dicom_network.connection_guard import guard

__all__ = ["AssociationListener", "ListenerLimits"]

_LOGGER: Final = logging.getLogger("echoquad_serve.dicom_network")
_POLL_S: Final = 0.1
"""Seconds until the listener takes notice of `close`."""

_MAX_PENDING: Final = 32
"""Connections that are no associations yet. A further one closes the oldest of them, so that connections that say
nothing keep nobody out: a modality that speaks is through in milliseconds."""


class ListenerLimits:
    """Limits of an `AssociationListener`, and what it asks and tells its owner.

    Parameters
    ----------
    acse_timeout, network_timeout
        Seconds for the TLS handshake and for the association request; seconds for each PDU.
    admits_address
        Whether connections from an address are taken.
    prepare
        Called with each new association before it starts; returns what is called after its end.
    """

    def __init__(
        self,
        acse_timeout: float,
        network_timeout: float,
        admits_address: Callable[[str], bool],
        prepare: Callable[[Association], Callable[[], None]],
    ) -> None:
        self.acse_timeout = acse_timeout
        self.network_timeout = network_timeout
        self.admits_address = admits_address
        self.prepare = prepare


class _Handler(RequestHandler):  # type: ignore[misc]
    """Runs an association in the thread of its connection, up to its end."""

    def handle(self) -> None:
        association = self._create_association()
        # pynetdicom finds the associations of a server by this word in the names of threads.
        association.name = "echoquad-dicom-AcceptorThread"
        association.dul.name = "echoquad-dicom-upper-layer"
        association.dul.daemon = True
        limits = self.server.limits
        guard(association, limits.network_timeout)
        finish = limits.prepare(association)
        try:
            evt.trigger(association, evt.EVT_CONN_OPEN, {"address": self.client_address})
            association.start()
            association.join()
            association.dul.join(limits.network_timeout)
        finally:
            finish()


class AssociationListener(ThreadedAssociationServer):  # type: ignore[misc]
    """A server of associations that a silent or hostile client cannot block.

    pynetdicom's own server makes the TLS handshake in its accept loop without a time limit, starts two polling threads
    for every connection, waits for ever for the rest of a PDU, and collects garbage every 30 seconds.
    """

    limits: ListenerLimits
    request_queue_size = 128  # connections that the system takes until the loop does; with 5, a scan delays others

    def __init__(self, *arguments: Any, limits: ListenerLimits, **options: Any) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._pending: dict[socket.socket, None] = {}  # in the order of their arrival
        self._threads_running: set[threading.Thread] = set()
        self._connections: set[socket.socket] = set()
        self._thread: threading.Thread | None = None
        self.refused = 0
        super().__init__(*arguments, request_handler=_Handler, **options)

    @property
    def pending(self) -> int:
        """Number of connections that are no associations yet."""
        return len(self._pending)

    @property
    def listening(self) -> bool:
        """Whether connections are taken."""
        return self._thread is not None and self._thread.is_alive()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; the TLS handshake is left to its thread."""
        try:
            connection, address = self.socket.accept()
            return connection, address
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                time.sleep(0.2)  # the connection still waits, and the loop would spin
            raise

    def verify_request(self, request: socket.socket, client_address: tuple[Any, ...]) -> bool:
        """Return whether an address may connect."""
        if self.limits.admits_address(client_address[0]):
            return True
        self.refused += 1
        _LOGGER.warning("the DICOM node closed a connection from %s, which no caller has", client_address[0])
        return False

    def process_request(self, request: socket.socket, client_address: tuple[Any, ...]) -> None:
        """Start the thread of a connection."""
        thread = threading.Thread(
            target=self._serve, args=(request, client_address), name="echoquad-dicom-connection", daemon=True
        )
        with self._lock:
            evicted = next(iter(self._pending)) if len(self._pending) >= _MAX_PENDING else None
            if evicted is not None:
                del self._pending[evicted]
                self.refused += 1
            self._pending[request] = None
            self._connections.add(request)
            self._threads_running.add(thread)
        if evicted is not None:
            _shut_down(evicted)
        thread.start()

    def established(self, request: socket.socket) -> None:
        """Count a connection as an association from now on."""
        with self._lock:
            self._pending.pop(request, None)

    def service_actions(self) -> None:
        """Do nothing: Python collects what has ended in its own time, and a full collection delays every thread."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection; the standard library would print it."""
        _LOGGER.exception("a DICOM connection has ended with a fault")

    def start(self) -> None:
        """Listen in a thread."""
        self._thread = threading.Thread(
            target=self.serve_forever, args=(_POLL_S,), name="echoquad-dicom-listener", daemon=True
        )
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Stop listening, close all connections, and wait for their threads at most so many seconds."""
        BaseServer.shutdown(self)  # pynetdicom's own expects to be in a list of its application entity
        self.server_close()
        with self._lock:
            connections, threads = list(self._connections), list(self._threads_running)
        for connection in connections:
            _shut_down(connection)
        end = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _serve(self, request: socket.socket, client_address: tuple[Any, ...]) -> None:
        connection = request
        try:
            request.settimeout(self.limits.acse_timeout)
            if request.recv(1, socket.MSG_PEEK):  # the threads of an association start with the first byte
                if self.ssl_context is not None:
                    connection = self.ssl_context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                    with self._lock:  # the socket object is a new one, which has the descriptor
                        self._connections.add(connection)
                        if request in self._pending:
                            self._pending[connection] = self._pending.pop(request)
                    connection.do_handshake()
                connection.settimeout(self.limits.network_timeout)
                self.finish_request(connection, client_address)
        except (OSError, ssl.SSLError) as error:
            _LOGGER.info("a connection from %s to the DICOM node failed (%s)", client_address[0], type(error).__name__)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            with self._lock:
                for one in (request, connection):
                    self._pending.pop(one, None)
                    self._connections.discard(one)
                self._threads_running.discard(threading.current_thread())
            _shut_down(connection)
            connection.close()
            request.close()


def _shut_down(connection: socket.socket) -> None:
    """End a connection at once, so that a thread that reads or writes goes on; its owner closes it."""
    with contextlib.suppress(OSError):  # it has ended
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # of the TCP connection, also under TLS
