"""Overlays: the original frame with its four quadrants, what each was taken for, and the decision on top."""

from __future__ import annotations

import bisect
import hashlib
import math
import os
import sys
from pathlib import Path, PurePosixPath
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from echoquad_runtime.contract import INDETERMINATE, QUADRANTS, Contract
from echoquad_runtime.frames.discovery import OVERLAY_SUFFIX
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.image import over_black, to_grey
from echoquad_runtime.frames.reader import load_image
from echoquad_runtime.overlay.activation_map import lay_heat
from echoquad_runtime.predict.predictor import Prediction
from echoquad_runtime.quadrants import quadrant_boxes
from echoquad_runtime.storage.atomic import make_folder, write_atomically

__all__ = ["draw_overlay", "overlay_path", "save_overlay"]

MIN_LONG_SIDE: Final = 720  # pixels; a smaller frame is enlarged by a whole factor, or its labels would hide it
MIN_SIDE: Final = 420  # the narrowest that the header's line fits in
MAX_FACTOR: Final = 8

# Okabe and Ito's palette, which readers with a colour vision deficiency can tell apart. doi:10.1038/nmeth.1618
_COLOURS: Final = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
_INK: Final = "#FFFFFF"
_UNDECIDED: Final = "#C8CDD2"  # of no class
_BAND: Final = "#101418"
_FOOTNOTE: Final = "EchoQuad · research use only"

_LONGEST_NAME: Final = 255  # bytes, or on Windows signs, that disks allow
_LONGEST_PATH: Final = {"win32": 259, "darwin": 1023}.get(
    sys.platform, 4095
) - 40  # what is being written is named longer


def draw_overlay(image: Image.Image, prediction: Prediction, contract: Contract) -> Image.Image:
    """Draw a decision over its frame.

    Parameters
    ----------
    image
        The frame as decoded: any mode, any size.
    prediction
        What was decided of it.
    contract
        Says where the quadrants lie.

    Returns
    -------
    RGB image
        The frame, enlarged by a whole factor where it is small, below a band with the decision; under the colours of
        its class activation maps where the prediction has them.
    """
    deep = image.mode.startswith("I") or image.mode == "F"
    frame = (Image.fromarray(to_grey(image)) if deep else over_black(image)).convert("RGB")
    factor = _enlargement(*frame.size)
    whole = quadrant_boxes(*frame.size, contract.keep)
    frame = frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)
    boxes = [(left * factor, top * factor, end * factor, bottom * factor) for left, top, end, bottom in whole]
    if prediction.cam is not None:
        frame = lay_heat(frame, prediction.cam, boxes, [_colour(name, contract) for name in contract.classes])

    text_size = max(15, round(min(frame.size) / 26))
    text, small, title = (_font(text_size * scale) for scale in (1.0, 0.8, 1.45))
    pad = round(text_size * 0.5)
    band = round(text_size * 3.2) + pad
    canvas = Image.new("RGB", (frame.width, frame.height + band), _BAND)
    canvas.paste(frame, (0, band))
    draw = ImageDraw.Draw(canvas, "RGBA")

    colour = _colour(prediction.label, contract)
    shown = prediction.probabilities[contract.classes.index(prediction.decided)]
    room = frame.width - 2 * pad
    right = draw.textlength(_FOOTNOTE, small)
    if right < frame.width / 2:
        draw.text((frame.width - pad - right, pad), _FOOTNOTE, fill="#9AA4AE", font=small)
        headline = _fit(draw, prediction.label, title, room - right - 2 * pad, f"  mean {shown:.2f}")
    else:
        headline = _fit(draw, prediction.label, title, room, f"  mean {shown:.2f}")
    draw.text((pad, pad), headline, fill=colour, font=title)
    detail = _fit(
        draw,
        "  ·  ".join([*_warning(prediction), _reason(prediction), *_legend(prediction), prediction.file]),
        small,
        room,
    )
    draw.text((pad, pad + round(text_size * 1.9)), detail, fill=_INK, font=small)

    line = max(2, text_size // 7)
    for index, quadrant in enumerate(QUADRANTS):
        left, top, end, bottom = boxes[index]
        label = prediction.quadrant_labels[index]
        p = prediction.quadrant_probabilities[index][contract.classes.index(label)]
        colour = _colour(label, contract)
        # Inset by half a line, so that neighbours' boxes lie side by side and not on one another.
        draw.rectangle(
            (left + 1, top + band + 1, max(left + 1, end - 2), max(top + band + 1, bottom + band - 2)),
            outline=colour,
            width=line,
        )
        words = _fit(draw, f"{quadrant}  {label}", text, end - left - 8 * line, f" {p:.2f}")
        x, y = left + 4 * line, top + band + 3 * line
        extent = draw.textbbox((x, y), words, font=text)
        plate = (extent[0] - line, extent[1] - line, extent[2] + line, extent[3] + line)
        draw.rectangle(plate, fill=(16, 20, 24, 190))
        draw.text((x, y), words, fill=colour, font=text)
    return canvas


def overlay_path(folder: Path, name: str) -> Path:
    """Name an overlay after its frame: the same relative path under `folder`, with `OVERLAY_SUFFIX` added.

    The frame's own ending stays in the name, so that ``a.png`` and ``a.jpg`` do not overwrite each other. What is too
    long for a name, or for a path, is cut and has a hash of the whole at its end; too long a path has no folders.
    """
    # A drive's colon and a backslash would lead elsewhere on Windows.
    parts = [part.replace(":", "_").replace("\\", "_") for part in PurePosixPath(name).parts]
    parts = [part for part in parts if part.strip("/") and part != ".."] or ["frame"]
    last = f"{parts[-1]}{OVERLAY_SUFFIX}"
    if len(os.fsencode(last)) > _LONGEST_NAME:
        last = _shortened(parts[-1], name)
    path = folder.joinpath(*parts[:-1], last)
    if len(os.fsencode(path.absolute())) > _LONGEST_PATH:
        path = folder / _shortened(parts[-1], name)
    return path


def _shortened(part: str, name: str) -> str:
    whole = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{part[:40]}-{whole}{OVERLAY_SUFFIX}"


def save_overlay(folder: Path, source: FrameFile | Path, prediction: Prediction, contract: Contract) -> Path:
    """Read the frame again, draw its overlay and save it under `folder`; gives the file's path.

    Raises
    ------
    FrameError
        If the frame cannot be read any more.
    OutputError
        If the system refuses to write.
    """
    file = source if isinstance(source, FrameFile) else FrameFile(source, source.name)
    picture = draw_overlay(load_image(file), prediction, contract)
    target = overlay_path(folder, prediction.file)
    make_folder(target.parent)
    with write_atomically(target) as stream:
        picture.save(stream, "PNG")
    return target


def _enlargement(width: int, height: int) -> int:
    wanted = max(MIN_LONG_SIDE / max(width, height), MIN_SIDE / min(width, height), 1.0)
    return min(MAX_FACTOR, math.ceil(wanted - 0.25))


def _warning(prediction: Prediction) -> list[str]:
    flags = ", ".join(flag for flag in prediction.flags if flag != "tie")  # which the reason has
    return [f"flagged {flags}"] if flags else []


def _legend(prediction: Prediction) -> list[str]:
    return [] if prediction.cam is None else ["colours: evidence"]


def _reason(prediction: Prediction) -> str:
    leaning = f"leans to {prediction.leaning}, " if prediction.leaning else ""
    if prediction.method != "majority":
        return f"{leaning}{prediction.method} of four quadrants"
    votes = prediction.quadrant_labels.count(prediction.decided)
    tie = ", tie broken by the mean" if prediction.flags and "tie" in prediction.flags else ""
    return f"{leaning}{votes} of {len(QUADRANTS)} quadrants{tie}"


def _fit(draw: ImageDraw.ImageDraw, words: str, font: ImageFont.ImageFont, width: float, tail: str = "") -> str:
    """Shorten `words`, which have any length, to what fits beside `tail`; where next to nothing does, `tail` goes."""
    words = "".join(sign if sign.isprintable() else "?" for sign in words)  # a line break cannot be measured
    for ending, least in ((tail, 4), ("", 1)):
        if draw.textlength(words + ending, font) <= width:
            return words + ending
        shorter = [f"{words[:kept]}…{ending}" for kept in range(least, len(words))]
        fitting = bisect.bisect_right(shorter, width, key=lambda text: draw.textlength(text, font))
        if fitting:
            return shorter[fitting - 1]
    return ""


def _colour(label: str, contract: Contract) -> str:
    if label == INDETERMINATE:
        return _UNDECIDED
    return _COLOURS[contract.classes.index(label) % len(_COLOURS)]


def _font(size: float) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]  # Pillow's own union of its two font classes
