"""EMA weights: an exponential moving average of the trained weights, which is validated and kept in their place.

The average of the last steps lies nearer the middle of the low loss that the steps of a gradient oscillate around.
B. T. Polyak, A. B. Juditsky, SIAM J. Control Optim. 30 (1992) 838; A. Tarvainen, H. Valpola, "Mean teachers are better
role models", arXiv:1703.01780.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor

from echoquad_train.networks.classifier import QuadrantClassifier

__all__ = ["EmaWeights", "decay_at"]

_SLOW_START: Final = 10

# The names that torch.optim.swa_utils.AveragedModel gives its state: runs of earlier releases hold them.
_COUNT: Final = "n_averaged"
_PREFIX: Final = "module."


def decay_at(decay: float, steps: int) -> float:
    """Return the share of the average that a step keeps, after `steps` earlier ones: `decay`, and less at first.

    At first the average is close to the random weights that training begins with: (1 + steps) / (10 + steps) bounds
    what is kept of them, as in TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + steps) / (_SLOW_START + steps))


class EmaWeights:
    """A moving average of a model's weights and of its batch statistics.

    Parameters
    ----------
    model
        The trained model. Its tensors are collected once, so they must stay the same objects.
    decay
        The share of the average that a step keeps, 0 to below 1; about 1 / (1 - decay) steps count.
    capturable
        Keep the share in a tensor on the device, so that a recorded step reads its current value.

    Attributes
    ----------
    model
        The model with the averaged weights.
    """

    def __init__(self, model: QuadrantClassifier, decay: float, *, capturable: bool = False) -> None:
        self.model = copy.deepcopy(model)
        self._decay, self._steps = decay, 0
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]  # of batches
        self._averages, self._weights = [average for average, _ in floating], [weight for _, weight in floating]
        self._average_counts, self._counts = [average for average, _ in counts], [count for _, count in counts]
        self._taken = 1.0  # the share of the trained weights that the next step takes into the average
        self.share: Tensor | None = torch.ones((), device=pairs[0][0].device) if capturable else None

    def advance(self) -> None:
        """Count a step and set the share that `mix` takes of its weights: all of the first."""
        self._taken = 1 - decay_at(self._decay, self._steps) if self._steps else 1.0
        if self.share is not None:
            self.share.fill_(self._taken)
        self._steps += 1

    def mix(self) -> None:
        """Take the trained weights into the average. Computes on the device alone, so that it can be recorded."""
        if self.share is not None:
            differences = torch._foreach_sub(self._weights, self._averages)
            torch._foreach_mul_(differences, self.share)
            torch._foreach_add_(self._averages, list(differences))
        elif self._taken == 1.0:
            torch._foreach_copy_(self._averages, self._weights)
        else:
            torch._foreach_lerp_(self._averages, self._weights, self._taken)
        if self._counts:
            torch._foreach_copy_(self._average_counts, self._counts)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that `mix` changes."""
        return [*self._averages, *self._average_counts]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        named = {f"{_PREFIX}{name}": value for name, value in self.model.state_dict().items()}
        return {_COUNT: torch.tensor(self._steps), **named}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        weights = {name.removeprefix(_PREFIX): value for name, value in state.items() if name != _COUNT}
        self.model.load_state_dict(weights)
        self._steps = int(state[_COUNT])


def _tensors(model: QuadrantClassifier) -> list[Tensor]:
    return [value.detach() for value in chain(model.parameters(), model.buffers())]
