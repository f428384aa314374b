"""What the flags of a row mean, in words for a reader of a report."""

from __future__ import annotations

from typing import Final

__all__ = ["describe_flag"]

_TEXTS: Final = {
    "blank": "no quadrant of the frame has a signal",
    "saturated": "a large part of the frame is white",
    "screen": "the frame looks like a picture of a whole screen",
    "nan": "the file contains numbers that are not defined",
    "uncropped": "the header names no ultrasound region, so the whole frame was used",
    "region-clamped": "the ultrasound region in the header leaves the frame and was cut at its edge",
    "colour": "a large part of the frame is coloured, as in colour Doppler",
    "tie": "the votes of the quadrants were tied",
    "unlike-training": "the frame is unlike the frames that the model was trained on",
}
_NO_SIGNAL: Final = "no-signal-"


def describe_flag(flag: str) -> str:
    """Return the meaning of a flag, without a full stop."""
    if flag.startswith(_NO_SIGNAL):
        return f"the quadrant {flag.removeprefix(_NO_SIGNAL)} has no signal"
    return _TEXTS.get(flag, "see the documentation of EchoQuad")
