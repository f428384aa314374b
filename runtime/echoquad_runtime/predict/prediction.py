"""The prediction: the decision on a frame, the probabilities behind it, and where it was computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from echoquad_runtime.bundle.typicality import UNLIKE_TRAINING, frame_typicality
from echoquad_runtime.contract import INDETERMINATE, Contract, VoteMethod
from echoquad_runtime.engine.io_binding import FloatArray, InferenceOutput
from echoquad_runtime.errors import ConfigError, FrameError
from echoquad_runtime.frames.frame_file import Failure
from echoquad_runtime.voting import aggregate_votes, apply_temperature

__all__ = ["TIE", "Prediction", "check_abstain_below", "check_abstain_unlike", "decide"]

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
        Quality flags, `TIE` if the mean probabilities broke a tie of the votes, and
        `echoquad_runtime.bundle.typicality.UNLIKE_TRAINING` if the typicality is below the bundle's threshold.
    device, precision
        What the frame was computed on and in.
    cam
        float32 [4, C, h, w], class activation maps of LA, RA, LV, RV, if requested: the mean of a map plus the head's
        bias is the class's logit.
    predicted_class
        The class that the vote decided: `label`, unless that is ``INDETERMINATE``.
    typicality
        How near the frame lies to the training frames: above 0, about 1 for a frame like them, higher is more typical.
        None if the model has no such score.
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
    typicality: float | None = None

    def __post_init__(self) -> None:
        if self.label != INDETERMINATE or not self.predicted_class:
            object.__setattr__(self, "predicted_class", self.label)

    def confidence(self, contract: Contract) -> float:
        """Return the confidence, 0 to 1: the predicted class's mean probability, calibrated by the contract."""
        calibrated = apply_temperature(np.array(self.probabilities), contract.frame_temperature)
        return float(calibrated[self.classes.index(self.predicted_class)])

    def abstaining(self, below: float | None, contract: Contract, *, unlike: bool = False) -> Prediction:
        """Return the prediction, with label ``INDETERMINATE`` if its confidence is lower than `below`.

        With `unlike`, also if it has the flag of a frame unlike the training frames.
        """
        sure = below is None or self.confidence(contract) >= below
        if sure and not (unlike and UNLIKE_TRAINING in self.flags):
            return self
        return replace(self, label=INDETERMINATE)


def decide(
    names: Sequence[str],
    flags: Sequence[tuple[str, ...]],
    output: InferenceOutput,
    contract: Contract,
    *,
    method: VoteMethod,
    device: str,
    precision: str,
    threshold: float | None,
) -> list[Prediction | Failure]:
    """Return the predictions of N frames: the votes on the network's output, without abstaining.

    Parameters
    ----------
    names, flags
        N names, and the quality flags of each frame.
    output
        The network's output for N frames.
    contract
        Supplies the classes and the weights of the votes.
    method, device, precision
        As in `Prediction`.
    threshold
        Typicality below which a frame is unlike the training frames; None sets no flag.

    Returns
    -------
    list of Prediction or Failure
        A failure if the output for a frame is not a number.
    """
    classes, p, maps = contract.classes, output.probabilities, output.maps
    finite = np.asarray(np.isfinite(p).all(axis=(1, 2)))
    decision = aggregate_votes(np.where(finite[:, None, None], p, 0), method, contract.vote_weights)
    scores = None if output.typicality is None else frame_typicality(output.typicality)
    if scores is not None:
        finite &= np.isfinite(scores)
    results: list[Prediction | Failure] = []
    for index, name in enumerate(names):
        if not finite[index]:  # argmax would select the first class
            error = FrameError(
                f"the network's answer on {device} in {precision} is not a number; try another precision, and run "
                "echoquad verify"
            )
            results.append(Failure(name, error))
            continue
        typicality = None if scores is None else float(scores[index])
        tied = method == "majority" and decision.margins[index] == 0
        unlike = typicality is not None and threshold is not None and typicality < threshold
        results.append(
            Prediction(
                file=name,
                classes=classes,
                method=method,
                label=classes[decision.labels[index]],
                probabilities=tuple(decision.probabilities[index].tolist()),
                quadrant_labels=tuple(classes[label] for label in decision.quadrant_labels[index]),
                quadrant_probabilities=tuple(tuple(row) for row in p[index].tolist()),
                flags=(*flags[index], *([TIE] if tied else []), *([UNLIKE_TRAINING] if unlike else [])),
                device=device,
                precision=precision,
                cam=None if maps is None else maps[index],
                typicality=typicality,
            )
        )
    return results


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


def check_abstain_unlike(unlike: bool, threshold: float | None) -> bool:
    """Return whether to abstain on frames unlike the training frames, after checking that the model can tell.

    Raises
    ------
    ConfigError
        If it has no threshold of the typicality.
    """
    if unlike and threshold is None:
        raise ConfigError(
            "abstain_unlike needs a bundle with a typicality score; found none in it; export the run again with its "
            "training frames at hand, or leave it out"
        )
    return unlike
