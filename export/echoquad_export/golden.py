"""Golden frames: what a cart replays to show that it computes what was trained.

They are phantoms, so that no patient's pixels ship.
"""

from __future__ import annotations

import numpy as np

from echoquad_runtime.bundle import Golden
from echoquad_runtime.quadrants import Grey, frame_quadrants
from echoquad_runtime.session import Engine
from echoquad_train.phantom import phantom_frame

__all__ = ["golden_frames", "make_golden"]

# Height and width: common and odd sizes, upright and wide, so that a crop or a resize that rounds otherwise shows.
_SIZES = ((240, 320), (241, 319), (300, 301), (177, 146), (354, 292), (129, 400), (224, 224), (97, 83))


def golden_frames() -> dict[str, Grey]:
    """Make the golden frames, by name: eight phantoms, a blank, a saturated, a ramp and the smallest frame there is."""
    frames = {
        f"phantom-{index}": phantom_frame(1000 + index, label=("NORM", "ASD")[index % 2], size=size)
        for index, size in enumerate(_SIZES)
    }
    ramp = np.add.outer(np.arange(160), np.arange(211)) * 255 // (159 + 210)
    return {
        **frames,
        "blank": np.zeros((120, 160), np.uint8),
        "saturated": np.full((121, 161), 255, np.uint8),
        "ramp": ramp.astype(np.uint8),
        "smallest": np.array([[0, 255], [128, 64]], np.uint8),
    }


def make_golden(engine: Engine) -> Golden:
    """Judge the golden frames with the training code, one frame at a time."""
    frames = golden_frames()
    answers = [engine.infer(frame_quadrants(frame, engine.contract)) for frame in frames.values()]
    return Golden(
        names=tuple(frames),
        frames=tuple(frames.values()),
        logits=np.stack([logits for logits, _ in answers]),
        probabilities=np.stack([probabilities for _, probabilities in answers]),
    )
