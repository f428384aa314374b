"""Limits of size and time for what comes over a connection, which pynetdicom does not have."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from pynetdicom.association import Association

__all__ = ["MAX_PDU_BYTES", "PDU_BYTES", "guard"]

_LOGGER: Final = logging.getLogger("echoquad_serve.dicom_network")
PDU_BYTES: Final = 128 * 1024
"""Largest P-DATA PDU that is asked for; pynetdicom's 16 KiB make a clip slow."""

MAX_PDU_BYTES: Final = 1024**2
"""Largest PDU that is read. Its header may announce 4 GiB, for which pynetdicom would take the memory."""

_IDLE: Final = "Sta1"
"""State of the upper layer without a connection (PS3.8, table 9-1)."""


def guard(association: Association, seconds: float) -> None:
    """Limit the size of each PDU, and the time of each from its first byte to its last, and of each write.

    An association whose peer exceeds a limit ends as if the connection were closed; so does one whose peer sends what
    pynetdicom does not expect or cannot decode, where else its thread would end with a trace and values on stderr. A
    connection that is closed before it has asked for an association ends its threads at once.
    """
    socket, machine = association.dul.socket, association.dul.state_machine
    socket.recv = partial(_receive, socket, seconds)
    machine.do_action = partial(_act, association, machine, machine.do_action)


def _act(association: Association, machine: Any, do_action: Callable[[str], None], event: str) -> None:
    try:
        do_action(event)
    except Exception as error:  # an unexpected event, or pydicom cannot decode a command
        _LOGGER.warning("a peer sent what cannot be handled (%s); its connection is closed", type(error).__name__)
        association.dul.kill_dul()
        association.dimse.msg_queue.put((None, None))  # whoever waits for an answer goes on
    if machine.current_state == _IDLE and association.requestor.primitive is None:
        # pynetdicom would wait for a request over the closed connection for the whole ACSE time-out.
        association.dul.to_user_queue.put(None)


def _receive(socket: Any, seconds: float, size: int) -> bytearray:
    """Read `size` bytes, fewer if the peer closes the connection; as ``AssociationSocket.recv``.

    Raises
    ------
    OSError
        If the size exceeds the limit, or the bytes do not come in time.
    """
    if size > MAX_PDU_BYTES:
        raise OSError("the PDU is too large")
    received = bytearray()
    end = time.monotonic() + seconds
    connection = socket.socket
    try:
        while len(received) < size:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("the PDU does not come in time")
            connection.settimeout(left)
            part = connection.recv(min(size - len(received), 65536))
            if not part:
                break
            received += part
    finally:
        connection.settimeout(seconds)  # of the next write
    return received
