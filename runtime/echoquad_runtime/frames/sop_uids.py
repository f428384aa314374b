"""The identity that a DICOM file states, read without decoding anything."""

from __future__ import annotations

from pathlib import Path

from echoquad_runtime.frames.dicom.elements import read_sop_uids
from echoquad_runtime.frames.file_access import open_frame_file, read_errors

__all__ = ["sop_uids"]


def sop_uids(path: Path) -> tuple[str, str]:
    """Return the SOP class UID and the SOP instance UID that the file meta information of a DICOM file states.

    Both are as they are in the file, unchecked; empty if it is no DICOM file, or states none.

    Raises
    ------
    FrameReadError
        If the file cannot be read.
    """
    with open_frame_file(path) as stream, read_errors():
        return read_sop_uids(stream)
