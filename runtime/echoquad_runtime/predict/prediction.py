"""The prediction: the decision on a frame, the probabilities behind it, and where it was computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from echoquad_runtime.contract import INDETERMINATE, Contract, VoteMethod
from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.errors import ConfigError
from echoquad_runtime.voting import apply_temperature

__all__ = ["TIE", "Prediction", "check_abstain_below"]

TIE: Final = "tie"
"""Flag of a frame whose quadrants' votes are tied, so that the mean probabilities decide."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The decision on one frame.

    Attributes
    ----------
    file
        The frame's name.
    classes
        The C class names; every row of probabilities is in this order.
    method
        The vote rule.
    label
        The decided class, or ``INDETERMINATE`` if the predictor abstains.
    probabilities
        C numbers in [0, 1]: the plain mean over the quadrants, whatever the method.
    quadrant_labels, quadrant_probabilities
        The same for LA, RA, LV, RV: four names, four times C numbers.
    flags
        Quality flags, and `TIE` if the mean probabilities broke a tie of the votes.
    device, precision
        What the frame was computed on and in.
    cam
        float32 [4, C, h, w], class activation maps of LA, RA, LV, RV, if requested: the mean of a map plus the head's
        bias is the class's logit.
    predicted_class
        The class that the vote decided: `label`, unless that is ``INDETERMINATE``.
    """

    file: str
    classes: tuple[str, ...]
    method: VoteMethod
    label: str
    probabilities: tuple[float, ...]
    quadrant_labels: tuple[str, ...]
    quadrant_probabilities: tuple[tuple[float, ...], ...]
    flags: tuple[str, ...]
    device: str
    precision: str
    cam: FloatArray | None = field(default=None, compare=False, repr=False)
    predicted_class: str = ""

    def __post_init__(self) -> None:
        if self.label != INDETERMINATE or not self.predicted_class:
            object.__setattr__(self, "predicted_class", self.label)

    def confidence(self, contract: Contract) -> float:
        """Return the confidence, 0 to 1: the predicted class's mean probability, calibrated by the contract."""
        calibrated = apply_temperature(np.array(self.probabilities), contract.frame_temperature)
        return float(calibrated[self.classes.index(self.predicted_class)])

    def abstaining(self, below: float | None, contract: Contract) -> Prediction:
        """Return the prediction, with label ``INDETERMINATE`` if its confidence is lower than `below`."""
        if below is None or self.confidence(contract) >= below:
            return self
        return replace(self, label=INDETERMINATE)


def check_abstain_below(below: float | None) -> float | None:
    """Return the threshold for abstaining, after checking it.

    Raises
    ------
    ConfigError
        If it is not above 0 and at most 1.
    """
    if below is not None and not 0 < below <= 1:
        raise ConfigError(f"abstain_below is {below:g}; expected a probability above 0 and at most 1")
    return below
