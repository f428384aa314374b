"""Weight averaging: a second set of weights that follows the trained ones, and is validated and kept in their stead.

An exponential moving average over the last steps lies nearer the middle of the low loss around which the steps of a
gradient go to and fro. B. T. Polyak, A. B. Juditsky, SIAM J. Control Optim. 30 (1992) 838; A. Tarvainen, H. Valpola,
"Mean teachers are better role models", arXiv:1703.01780.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from echoquad_train.networks.model import QuadrantClassifier

__all__ = ["Average", "share_kept"]

_SLOW_START: Final = 10


def share_kept(decay: float, steps: int) -> float:
    """Give the share of the average that a step leaves, after so many: `decay`, and less at first.

    At first the average would be of the random weights that training began from: (1 + steps) / (10 + steps) bounds
    what is kept of it, as in TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + steps) / (_SLOW_START + steps))


class Average:
    """A moving average of a model's weights and of its batch statistics.

    Parameters
    ----------
    model
        What is trained; its device and memory format are the average's.
    decay
        The share of the average that a step leaves, 0 to below 1; about 1 / (1 - decay) steps count.
    """

    def __init__(self, model: QuadrantClassifier, decay: float) -> None:
        def mix(average: Sequence[Tensor], trained: Sequence[Tensor], _: Tensor | int) -> None:
            if average[0].is_floating_point():
                torch._foreach_lerp_(list(average), list(trained), 1 - share_kept(decay, self._steps))
            else:  # counts of batches
                torch._foreach_copy_(list(average), list(trained))

        self._average = AveragedModel(model, multi_avg_fn=mix, use_buffers=True)
        self._steps = 0  # torch's own count lies on the device, and to ask for it is to wait

    @property
    def model(self) -> QuadrantClassifier:
        """The model with the averaged weights."""
        return cast("QuadrantClassifier", self._average.module)

    def follow(self, model: QuadrantClassifier) -> None:
        """Take one step's weights into the average."""
        self._average.update_parameters(model)
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs."""
        return dict(self._average.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._average.load_state_dict(dict(state))
        self._steps = int(self._average.n_averaged)
