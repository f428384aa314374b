"""Overlays: the frame with its four quadrants, the class of each, and the decision above."""

from __future__ import annotations

import bisect
import hashlib
import io
import math
import os
import re
import sys
import threading
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Final

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from echoquad_runtime.contract import INDETERMINATE, QUADRANTS, Contract
from echoquad_runtime.frames.discovery import OVERLAY_SUFFIX
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.images.image import composite_over_black, to_grey
from echoquad_runtime.frames.reader import load_image
from echoquad_runtime.overlay.activation_map import draw_activation_maps
from echoquad_runtime.overlay.fonts import load_font
from echoquad_runtime.overlay.palette import BAND, CLASS_COLOURS, SILVER, SLATE, WHITE
from echoquad_runtime.predict.prediction import TIE, Prediction
from echoquad_runtime.quadrants import quadrant_boxes
from echoquad_runtime.storage.atomic import make_folder, write_bytes
from echoquad_runtime.storage.row_names import encode_text, to_row_name

__all__ = ["ROW_KEY", "draw_overlay", "overlay_path", "save_overlay"]

MIN_LONG_SIDE: Final = 720  # pixels; smaller frames are enlarged by an integer factor, or labels would cover them
MIN_SIDE: Final = 420  # pixels: the width of the header's text
MAX_FACTOR: Final = 8

_SEPARATOR: Final = "  ·  "
_FOOTNOTE: Final = "EchoQuad · research use only"

ROW_KEY: Final = "EchoQuad row"
"""Keyword of the text field in an overlay's PNG that has the name of its row, as result files state it."""

_HEAD_BYTES: Final = 1 << 16  # of a PNG, which has its text before its pixels

_LOCKS: Final = tuple(threading.Lock() for _ in range(64))  # one for names that a file system might not distinguish

_UNSAFE: Final = re.compile(r"""[<>:"|?*\\\x00-\x1f]|[. ]+\Z""" if sys.platform == "win32" else r"[:\\\0]")
"""What a part of a path cannot have: on Windows a drive's colon or a backslash would change the folder."""

_RESERVED: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)\s*(\.|\Z)", re.IGNORECASE)
_NUMBERED: Final = re.compile(r"#[1-9][0-9]{0,5}\Z")
_HASHED: Final = re.compile(r"-[0-9a-f]{16}\Z", re.IGNORECASE)
_KEPT: Final = 40  # characters of a name that is too long

_MAX_NAME: Final = 255  # bytes (Windows: characters) that file systems allow
_MAX_PATH: Final = {"win32": 259, "darwin": 1023}.get(sys.platform, 4095) - 40  # leaves room for a temporary name


def draw_overlay(image: Image.Image, prediction: Prediction, contract: Contract) -> Image.Image:
    """Draw a prediction over its frame.

    Parameters
    ----------
    image
        The decoded frame, of any mode and size.
    prediction
        The prediction.
    contract
        Defines the quadrants.

    Returns
    -------
    RGB image
        A band with the decision, and the frame below it, enlarged by an integer factor if it is small. If the
        prediction has class activation maps, their colours cover the frame.
    """
    deep = image.mode.startswith("I") or image.mode == "F"
    frame = (Image.fromarray(to_grey(image)) if deep else composite_over_black(image)).convert("RGB")
    factor = _enlargement(*frame.size)
    unscaled = quadrant_boxes(*frame.size, contract.keep, contract.quadrants)
    frame = frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)
    boxes = [(left * factor, top * factor, end * factor, bottom * factor) for left, top, end, bottom in unscaled]
    if prediction.cam is not None:
        frame = draw_activation_maps(
            frame, prediction.cam, boxes, [_colour(name, contract) for name in contract.classes]
        )

    text_size = max(15, round(min(frame.size) / 26))
    text, small, title = (load_font(text_size * scale) for scale in (1.0, 0.8, 1.45))
    pad = round(text_size * 0.5)
    band = round(text_size * 3.2) + pad
    canvas = Image.new("RGB", (frame.width, frame.height + band), BAND)
    canvas.paste(frame, (0, band))
    draw = ImageDraw.Draw(canvas, "RGBA")

    colour = _colour(prediction.label, contract)
    shown = prediction.probabilities[contract.classes.index(prediction.predicted_class)]
    room = frame.width - 2 * pad
    right = draw.textlength(_FOOTNOTE, small)
    if right < frame.width / 2:
        draw.text((frame.width - pad - right, pad), _FOOTNOTE, fill=SLATE, font=small)
        headline = _fit(draw, prediction.label, title, room - right - 2 * pad, f"  mean {shown:.2f}")
    else:
        headline = _fit(draw, prediction.label, title, room, f"  mean {shown:.2f}")
    draw.text((pad, pad), headline, fill=colour, font=title)
    reasons = _SEPARATOR.join([*_warning(prediction), _reason(prediction), *_legend(prediction)])
    detail = _fit_caption(draw, reasons, prediction.file, small, room)
    draw.text((pad, pad + round(text_size * 1.9)), detail, fill=WHITE, font=small)

    line = max(2, text_size // 7)
    for index, quadrant in enumerate(QUADRANTS):
        left, top, end, bottom = boxes[index]
        label = prediction.quadrant_labels[index]
        p = prediction.quadrant_probabilities[index][contract.classes.index(label)]
        colour = _colour(label, contract)
        # Inset by half a line, so that the boxes of neighbours do not overlap.
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


def overlay_path(folder: Path, name: str, frame: int | None = None, *, hashed: bool = False) -> Path:
    """Return the path of a frame's overlay: the frame's relative path under `folder`, with `OVERLAY_SUFFIX` added.

    Frames with different names have different paths, and a frame always has the same. The frame's extension stays in
    the name, so that ``a.png`` and ``a.jpg`` do not overwrite each other. If the name cannot be kept as it is, it ends
    with a hash of the full name: a name with a character that is changed, with ``..``, or too long; a file whose name
    looks like a frame of a clip, or like a hashed name. A path that is too long also loses its folders.

    Parameters
    ----------
    folder
        The folder of the overlays.
    name
        The frame's name.
    frame
        Its number in a multi-frame file, which ends `name`; None if the file is a single frame.
    hashed
        Add the hash in any case.
    """
    parts = [_safe_part(part) for part in PurePosixPath(name).parts]
    parts = [part for part in parts if part.strip("/") and part != ".."] or ["frame"]
    parts[:-1] = [f"{part}_" if part.lower().endswith(OVERLAY_SUFFIX) else part for part in parts[:-1]]
    looks_numbered = frame is None and _NUMBERED.search(name) is not None
    key = f"{name}\0" if looks_numbered else name
    last = f"{parts[-1]}{OVERLAY_SUFFIX}"
    if hashed or looks_numbered or "/".join(parts) != name or _HASHED.search(parts[-1]):
        last = _add_hash(parts[-1], key)
    if len(os.fsencode(last)) > _MAX_NAME:
        last = _add_hash(parts[-1][:_KEPT], key)
    path = folder.joinpath(*parts[:-1], last)
    if len(os.fsencode(path.absolute())) > _MAX_PATH:
        path = folder / _add_hash(parts[-1][:_KEPT], key)
    return path


def _safe_part(part: str) -> str:
    part = _UNSAFE.sub("_", part)
    # Windows takes "con.png" for a device, whatever its extension.
    return f"_{part}" if sys.platform == "win32" and _RESERVED.match(part) else part


def _add_hash(part: str, key: str) -> str:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{part}-{digest}{OVERLAY_SUFFIX}"


def save_overlay(folder: Path, source: FrameFile | Path, prediction: Prediction, contract: Contract) -> Path:
    """Read the frame again, draw its overlay, save it under `folder` and return its path.

    The PNG states its row in the text field `ROW_KEY`. A picture of another row is never overwritten: if the file
    system does not distinguish two names, as ``a.png`` and ``A.png`` on Windows, the later one gets a hash.

    Raises
    ------
    FrameError
        If the frame can no longer be read.
    OutputError
        If the overlay cannot be written.
    """
    file = source if isinstance(source, FrameFile) else FrameFile(source, source.name)
    picture = draw_overlay(load_image(file), prediction, contract)
    row = encode_text(to_row_name(prediction.file)).decode()
    info = PngImagePlugin.PngInfo()
    info.add_itxt(ROW_KEY, row)
    png = io.BytesIO()
    picture.save(png, "PNG", pnginfo=info)
    target = overlay_path(folder, prediction.file, file.frame)
    make_folder(target.parent)
    with _LOCKS[hash(unicodedata.normalize("NFC", str(target)).casefold()) % len(_LOCKS)]:
        if _row_of(target) not in (None, row):
            target = overlay_path(folder, prediction.file, file.frame, hashed=True)
        write_bytes(target, png.getvalue())
    return target


def _row_of(path: Path) -> str | None:
    """Return the row that an overlay states; None if there is no overlay, or one of an earlier release."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError:
        return None
    begin = f"{ROW_KEY}\0\0\0\0\0".encode()  # an uncompressed iTXt without language and translated keyword
    at = head.find(b"iTXt" + begin)
    if at < 4 or not head.startswith(b"\x89PNG"):
        return None
    length = int.from_bytes(head[at - 4 : at])
    return head[at + 4 + len(begin) : at + 4 + length].decode("utf-8", "replace")


def _enlargement(width: int, height: int) -> int:
    factor = max(MIN_LONG_SIDE / max(width, height), MIN_SIDE / min(width, height), 1.0)
    return min(MAX_FACTOR, math.ceil(factor - 0.25))


def _warning(prediction: Prediction) -> list[str]:
    flags = ", ".join(flag for flag in prediction.flags if flag != TIE)  # `_reason` mentions a tie
    return [f"flagged {flags}"] if flags else []


def _legend(prediction: Prediction) -> list[str]:
    return [] if prediction.cam is None else ["colours: evidence"]


def _reason(prediction: Prediction) -> str:
    leaning = f"leans to {prediction.predicted_class}, " if prediction.label == INDETERMINATE else ""
    if prediction.method != "majority":
        return f"{leaning}{prediction.method} of four quadrants"
    votes = prediction.quadrant_labels.count(prediction.predicted_class)
    tie = ", tie broken by the mean" if TIE in prediction.flags else ""
    return f"{leaning}{votes} of {len(QUADRANTS)} quadrants{tie}"


def _fit_caption(draw: ImageDraw.ImageDraw, reasons: str, name: str, font: ImageFont.ImageFont, width: float) -> str:
    """Shorten `reasons` at its end and a frame's name at its start, so that both fit.

    The end of a name distinguishes frames: the file and the number of the frame. It gets at least half of the width.
    """
    reasons, name = _printable(reasons), _printable(name)
    room = max(width - draw.textlength(reasons + _SEPARATOR, font), width / 2)
    if draw.textlength(name, font) > room:
        shorter = [f"…{name[start:]}" for start in range(len(name), 0, -1)]
        fitting = bisect.bisect_right(shorter, room, key=lambda text: draw.textlength(text, font))
        name = shorter[fitting - 1] if fitting > 1 else ""
    return _fit(draw, reasons, font, width - draw.textlength(name, font), _SEPARATOR) + name


def _printable(text: str) -> str:
    # The width of a line break is undefined.
    return "".join(character if character.isprintable() else "?" for character in text)


def _fit(draw: ImageDraw.ImageDraw, words: str, font: ImageFont.ImageFont, width: float, tail: str = "") -> str:
    """Shorten `words` to fit beside `tail`; drop `tail` if almost nothing fits."""
    words = _printable(words)
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
        return SILVER
    return CLASS_COLOURS[contract.classes.index(label) % len(CLASS_COLOURS)]
