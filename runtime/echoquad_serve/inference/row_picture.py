"""The picture of a recorded row: its frame, read again, with the evidence of the decision."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from echoquad_runtime.contract import Contract
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.reader import load_image
from echoquad_runtime.overlay.drawing import draw_overlay
from echoquad_serve.inference.loaded_model import ActivationMap
from echoquad_serve.inference.rows import prediction_of
from echoquad_serve.records import Result

__all__ = ["draw_row"]


def draw_row(
    result: Result,
    index: int,
    source: Path,
    contract: Contract,
    activation_map: Callable[[FrameFile], ActivationMap] | None = None,
) -> bytes:
    """Return the frame of a row with its evidence, as PNG. The decision is the recorded one.

    Parameters
    ----------
    result, index
        The row.
    source
        The object's file.
    contract
        That of the bundle that decided.
    activation_map
        Computes the map that is drawn; None draws none.

    Raises
    ------
    FrameError
        If the frame cannot be read again.
    BundleError
        If the bundle computes no activation maps.
    KeyError
        If the row is not one of this contract.
    """
    row = result.rows[index]
    number = str(row["file"])[len(result.name) :].removeprefix("#")
    file = FrameFile(source, str(row["file"]), int(number) if number.isdecimal() else None)
    prediction = prediction_of(row, contract)
    if activation_map is not None:
        prediction = replace(prediction, cam=activation_map(file))
    picture, png = draw_overlay(load_image(file), prediction, contract), io.BytesIO()
    picture.save(png, "PNG", compress_level=1)
    return png.getvalue()
