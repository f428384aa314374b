"""The identity that a DICOM file states, read without decoding anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from echoquad_runtime.frames.dicom.elements import read_sop_uids
from echoquad_runtime.frames.file_access import open_frame_file, read_errors

__all__ = ["is_uid", "sop_uids"]

_UID: Final = re.compile(r"[0-9]+(\.[0-9]+)*")


def is_uid(value: object) -> bool:
    """Return whether a value is a UID: at most 64 digits and dots. Components may have leading zeros, as some do."""
    return isinstance(value, str) and len(value) <= 64 and _UID.fullmatch(value) is not None


def sop_uids(path: Path) -> tuple[str, str]:
    """Return the SOP class UID and the SOP instance UID that the file meta information of a DICOM file states.

    Both are empty if it is no DICOM file, or does not state two UIDs.

    Raises
    ------
    FrameReadError
        If the file cannot be read.
    """
    with open_frame_file(path) as stream, read_errors():
        sop_class_uid, sop_instance_uid = read_sop_uids(stream)
    return (sop_class_uid, sop_instance_uid) if is_uid(sop_class_uid) and is_uid(sop_instance_uid) else ("", "")
