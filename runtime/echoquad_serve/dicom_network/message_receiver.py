"""Messages that a peer sends (PS3.7): assembled with limits, data sets of C-STORE written to files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_CANCEL_RQ, C_STORE_RQ, DIMSEMessage
from pynetdicom.pdu_primitives import P_DATA

from echoquad_runtime.frames.sop_uids import is_uid
from echoquad_serve.dicom_network.received_file import ReceivedFile
from echoquad_serve.dicom_network.sop_classes import IMAGE_CLASSES

__all__ = ["MessageReceiver"]

_LOGGER: Final = logging.getLogger("echoquad_serve.dicom_network")
_MAX_COMMAND_BYTES: Final = 64 * 1024
_MAX_DATA_BYTES: Final = 1024**2
"""Of a data set that is kept in memory and decoded, that of a storage commitment: about 5,000 objects."""

_MAX_WAITING: Final = 4
"""Requests that a peer may send before it takes the answers. It should take each answer first."""

_INVALID_PDU: Final = "Evt19"
"""Event of the upper layer's state machine: abort the association."""


class _ProtocolError(ValueError):
    """The peer sends what it must not."""


class MessageReceiver(DIMSEServiceProvider):  # type: ignore[misc]
    """Assembles the messages of an association that a peer has requested.

    pynetdicom's own receiver keeps data sets of any size in memory, or in the system's folder for temporary files,
    where they stay if the connection is cut; and it starts a thread for each event report.

    Parameters
    ----------
    association
        The association.
    folder
        Where data sets of C-STORE are written.
    check_room
        Raises an `IntakeError` if there is no room for so many bytes.
    """

    def __init__(self, association: Association, folder: Path, check_room: Callable[[int], None]) -> None:
        super().__init__(association)
        self.message: Any = None  # that is being received
        self._folder = folder
        self._check_room = check_room
        self._files: list[ReceivedFile] = []
        self._memory = 0
        self._broken = False

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Add the parts of a message; pass the message on after the last one."""
        for context_id, data in primitive.presentation_data_value_list:
            if self._broken:  # what the peer sent before it takes notice of the abort
                return
            try:
                self._receive(context_id, data)
            except Exception as error:
                _LOGGER.warning("a peer sent an invalid message (%s); its association is aborted", type(error).__name__)
                self._broken = True
                self.dul.event_queue.put(_INVALID_PDU)

    def remove_files(self) -> None:
        """Remove the files that were not taken, at the end of the association."""
        for file in self._files:
            file.remove()
        self._files.clear()

    def _receive(self, context_id: int, data: bytes) -> None:
        if not data or context_id not in self.assoc._accepted_cx:
            raise _ProtocolError("a part without a header, or of a context that was not accepted")
        command = bool(data[0] & 1)
        writing = self.message is not None and self.message._data_set_file is not None
        if not writing:
            self._memory += len(data)
        if self._memory > (_MAX_COMMAND_BYTES if command else _MAX_DATA_BYTES):
            raise _ProtocolError("the message is too large")
        expected = None if self.message is None else self.message.context_id  # set once the command is complete
        if command is (expected is not None) or (not command and expected != context_id):
            raise _ProtocolError("a data set without a command, or a command within a data set")
        part = P_DATA()
        part.presentation_data_value_list = [[context_id, data]]
        self.message = self.message or DIMSEMessage()
        if self.message.decode_msg(part, self.assoc):
            self._complete(self.message)
        elif isinstance(self.message, C_STORE_RQ) and not writing:
            self._open_file(self.message, context_id)

    def _complete(self, message: Any) -> None:
        """Pass a message on to the association's thread, which handles one after another."""
        self.message, self._memory = None, 0
        self._files = [file for file in self._files if file.path.exists()]
        if isinstance(message, C_CANCEL_RQ):  # of a query; the node answers none
            return
        if self.msg_queue.qsize() > _MAX_WAITING:
            raise _ProtocolError("requests that do not wait for answers")
        self.msg_queue.put((message.context_id, message.message_to_primitive()))

    def _open_file(self, message: Any, context_id: int) -> None:
        """Direct the data set of a C-STORE, whose command is complete, to a file."""
        context = self.assoc._accepted_cx[context_id]
        sop_class = str(message.command_set.get("AffectedSOPClassUID", ""))
        if context.abstract_syntax not in IMAGE_CLASSES or sop_class not in IMAGE_CLASSES:
            # pynetdicom would pass it to the handler of another service, which knows no file
            raise _ProtocolError("a C-STORE of a class that was not negotiated")
        instance = str(message.command_set.get("AffectedSOPInstanceUID", ""))
        # The handler refuses an object without a valid UID, after it was sent.
        instance = instance if is_uid(instance) else "0"
        syntax = str(context.transfer_syntax[0])
        file = ReceivedFile(self._folder, sop_class, instance, syntax, self._check_room)
        self._files.append(file)
        message._data_set_file, message._data_set_path = file, file.path
