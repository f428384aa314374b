"""A connection with a time limit for everything that happens on it, so that a peer that drips bytes is cut off.

The time limit of a socket is one for each call: a peer that sends a byte now and then never exceeds it.
"""

from __future__ import annotations

import io
import socket
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["DeadlineSocket", "connect"]

_PIECE_BYTES: Final = 1 << 16


class DeadlineSocket:
    """A connected socket, as far as `http.client` needs one.

    Parameters
    ----------
    connection
        The socket.
    deadline
        Time of `time.monotonic` after which every call raises a TimeoutError.
    """

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection, self._deadline = connection, deadline

    def sendall(self, data: ReadableBuffer) -> None:
        """Send all of `data`."""
        rest = memoryview(data).cast("B")
        while rest:
            self._connection.settimeout(_remaining(self._deadline))
            rest = rest[self._connection.send(rest[:_PIECE_BYTES]) :]

    def receive(self, buffer: WriteableBuffer) -> int:
        """Receive into `buffer`, and return the number of bytes; 0 at the end."""
        self._connection.settimeout(_remaining(self._deadline))
        return self._connection.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return a stream of what is received; `mode` is ``rb``."""
        return io.BufferedReader(_Receiver(self))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class _Receiver(io.RawIOBase):
    def __init__(self, source: DeadlineSocket) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        return self._source.receive(buffer)


def connect(
    host: str,
    port: int,
    tls: ssl.SSLContext | None,
    connect_timeout: float,
    deadline: float,
    on_socket: Callable[[socket.socket], None],
) -> DeadlineSocket:
    """Connect to a host, by TLS if `tls` is given: to the first of its addresses that answers.

    Parameters
    ----------
    host, port
        Where to connect.
    tls
        Checks the host's certificate.
    connect_timeout
        Seconds for the connection to all addresses together.
    deadline
        Time of `time.monotonic` for the connection, the handshake, and all that follows.
    on_socket
        Called with each socket before it is used; shutting it down ends what is waiting on it.

    Raises
    ------
    OSError
        If no address answers in time, or the certificate is not accepted.
    """
    connected_by = min(deadline, time.monotonic() + connect_timeout)
    failure: OSError = OSError("the name has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            on_socket(connection)
            connection.settimeout(_remaining(connected_by))
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            connection.close()
            failure = error
            continue
        try:
            if tls is not None:
                connection = tls.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)
                on_socket(connection)
                connection.settimeout(_remaining(deadline))  # of the handshake as a whole
                connection.do_handshake()
            return DeadlineSocket(connection, deadline)
        except BaseException:
            connection.close()
            raise
    raise failure


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the time limit is over")
    return seconds
