"""One GET request with a time limit for all of it: connection, handshake and answer.

The time limit of `http.client` is one for each receive: a peer that sends a byte now and then never exceeds it. Here
the whole answer is received first, against one deadline and up to a size, and `http.client` then parses it in memory.
No proxy is used, and no redirect is followed, since either would carry the token elsewhere.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Final, cast

from echoquad_deploy.fleet.addresses import BoxAddress
from echoquad_deploy.fleet.errors import NoAnswerError
from echoquad_runtime._version import __version__

__all__ = ["Answer", "get"]

_MAX_ANSWER: Final = 4 << 20  # bytes; a service answers a few kilobytes
_PIECE: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its status, its headers and its body."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


def get(address: BoxAddress, path: str, deadline: float, token: str | None, tls: ssl.SSLContext) -> Answer:
    """Request a path of a service.

    Parameters
    ----------
    address
        The service.
    path
        Path of the URL, ASCII.
    deadline
        Time of `time.monotonic` by which the answer must be complete.
    token
        Bearer token; None to send none.
    tls
        Checks the certificate, if the address is encrypted.

    Raises
    ------
    NoAnswerError
        If there is no complete HTTP answer in time; the message says why.
    """
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {address.authority}",
        f"User-Agent: echoquad-fleet/{__version__}",
        "Accept: application/json, text/plain",
        "Connection: close",
    ]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    request = "\r\n".join([*lines, "", ""]).encode("ascii")
    try:
        received = _exchange(address, request, deadline, tls)
    except TimeoutError as error:
        raise NoAnswerError("no answer in time; check that it runs and the network, or raise --timeout") from error
    except ssl.SSLCertVerificationError as error:
        raise NoAnswerError(
            f"its certificate is not accepted ({error.verify_message}); name its authority with --ca"
        ) from error
    except ssl.SSLError as error:
        reason = (error.reason or "no TLS").replace("_", " ").lower()
        raise NoAnswerError(
            f"no TLS connection ({reason}); check https:// and whether it wants a --certificate"
        ) from error
    except socket.gaierror as error:
        raise NoAnswerError(f"the name cannot be resolved ({error.strerror}); check the address") from error
    except ConnectionRefusedError as error:
        raise NoAnswerError("connection refused: nothing listens there; check that it runs, and the port") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise NoAnswerError(f"no connection ({reason}); check that it runs, and the network") from error
    if not received and address.encrypted:  # in TLS 1.3 a missing certificate is noticed after the handshake
        raise NoAnswerError("it closes the connection; it may want a --certificate")
    return _parse(received)


def _exchange(address: BoxAddress, request: bytes, deadline: float, tls: ssl.SSLContext) -> bytes:
    """Send a request and return all that comes until the peer closes."""
    with _connect(address, deadline) as plain:
        connection = plain
        if address.encrypted:
            encrypted = tls.wrap_socket(plain, server_hostname=address.host, do_handshake_on_connect=False)
            encrypted.settimeout(_remaining(deadline))  # of the handshake as a whole
            connection = encrypted
        with connection:
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            connection.settimeout(_remaining(deadline))
            connection.sendall(request)  # a few hundred bytes, which fit into the buffer of the connection
            received = bytearray()
            while len(received) <= _MAX_ANSWER:
                connection.settimeout(_remaining(deadline))
                if not (piece := connection.recv(_PIECE)):
                    break
                received += piece
            return bytes(received)


def _connect(address: BoxAddress, deadline: float) -> socket.socket:
    """Connect to the first address of the host that answers."""
    failure: OSError = OSError("the name has no address")
    for family, kind, protocol, _, where in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_remaining(deadline))
            connection.connect(where)
        except OSError as error:
            connection.close()
            failure = error
            continue
        return connection
    raise failure


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the time limit is over")
    return seconds


class _Received:
    """As much of a socket as `http.client` needs to parse what was received."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _parse(received: bytes) -> Answer:
    response = http.client.HTTPResponse(cast("socket.socket", _Received(received)))
    try:
        response.begin()
        body = response.read()
    except (http.client.HTTPException, ValueError, OSError) as error:
        found = "nothing" if not received else "an incomplete answer" if received[:5] == b"HTTP/" else "no HTTP"
        raise NoAnswerError(f"it answers {found}; check the port, and whether it is https://") from error
    if response.length or len(received) > _MAX_ANSWER:
        raise NoAnswerError(f"the answer is incomplete or has more than {_MAX_ANSWER >> 20} MiB; check the address")
    return Answer(response.status, response.headers, body)
