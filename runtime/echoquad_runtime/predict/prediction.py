"""The prediction: what was decided on a frame, from which numbers, and on what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from echoquad_runtime.contract import INDETERMINATE, Contract, VoteMethod
from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_runtime.errors import ConfigError
from echoquad_runtime.voting import apply_temperature

__all__ = ["Prediction", "checked_bound"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The decision on one frame.

    Attributes
    ----------
    file
        The frame's name.
    classes
        Class names; every row of probabilities is in this order.
    method
        The vote rule that decided.
    label
        The decided class, or ``INDETERMINATE`` where the predictor abstains.
    probabilities
        C numbers in [0, 1]: the plain mean over the quadrants, whatever the method.
    quadrant_labels, quadrant_probabilities
        The same for LA, RA, LV, RV: four names, four times C numbers.
    flags
        What a reader should know of this row: ``tie``.
    device, precision
        What really ran.
    cam
        float32 [4, C, h, w], class activation maps of LA, RA, LV, RV, where they were asked for: a map's mean and the
        head's bias are the class's logit.
    leaning
        The class that the vote decided, where `label` is ``INDETERMINATE``; else empty.
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
    leaning: str = ""

    @property
    def decided(self) -> str:
        """The class that the vote decided, abstained or not."""
        return self.leaning or self.label

    def confidence(self, contract: Contract) -> float:
        """Return the confidence, 0 to 1: the decided class's mean probability, calibrated by the contract."""
        shares = apply_temperature(np.array(self.probabilities), contract.frame_temperature)
        return float(shares[self.classes.index(self.decided)])

    def abstaining(self, below: float | None, contract: Contract) -> Prediction:
        """Return the prediction, as ``INDETERMINATE`` if its confidence is below a bound; None has no bound."""
        if below is None or self.confidence(contract) >= below:
            return self
        return replace(self, label=INDETERMINATE, leaning=self.decided)


def checked_bound(below: float | None) -> float | None:
    """Refuse a bound for abstaining that cannot be.

    Raises
    ------
    ConfigError
        If it is not above 0 and at most 1.
    """
    if below is not None and not 0 < below <= 1:
        raise ConfigError(f"abstain below {below:g} found; expected a probability above 0, at most 1")
    return below
