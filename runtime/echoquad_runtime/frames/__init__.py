"""Frames: finding them, recognising their file formats, decoding them to 8-bit grey, and flagging their quality."""

from echoquad_runtime.frames.dicom.transfer_syntaxes import SUPPORTED as DICOM_TRANSFER_SYNTAXES

__all__ = ["DICOM_TRANSFER_SYNTAXES"]
