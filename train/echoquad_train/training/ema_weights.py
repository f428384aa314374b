"""Exponential moving average (EMA) of the trained weights, which is validated and saved in their place.

Gradient steps oscillate around the minimum of the loss; their average lies closer to it.
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

# Names in the state of torch.optim.swa_utils.AveragedModel, which saved runs use.
_COUNT: Final = "n_averaged"
_PREFIX: Final = "module."


def decay_at(decay: float, steps: int) -> float:
    """Return the decay of the average after `steps` earlier steps: `decay`, and less at first.

    The first steps would keep too much of the random initial weights. (1 + steps) / (10 + steps) is an upper bound, as
    in TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + steps) / (_SLOW_START + steps))


class EmaWeights:
    """An exponential moving average of a model's weights and batch statistics.

    Parameters
    ----------
    model
        The trained model, whose tensors must stay the same objects.
    decay
        The fraction of the average that a step keeps, 0 to below 1; it averages over about 1 / (1 - decay) steps.
    capturable
        Keep the factor in a tensor on the device, so that a captured step reads its current value.

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
        self._factor = 1.0  # 1 - decay of the next step
        self.factor: Tensor | None = torch.ones((), device=pairs[0][0].device) if capturable else None

    def advance(self) -> None:
        """Count a step and set the factor of `update`. The first step replaces the average."""
        self._factor = 1 - decay_at(self._decay, self._steps) if self._steps else 1.0
        if self.factor is not None:
            self.factor.fill_(self._factor)
        self._steps += 1

    def update(self) -> None:
        """Update the average with the trained weights; never synchronises with the host, so that it can be captured."""
        if self.factor is not None:
            differences = torch._foreach_sub(self._weights, self._averages)
            torch._foreach_mul_(differences, self.factor)
            torch._foreach_add_(self._averages, list(differences))
        elif self._factor == 1.0:
            torch._foreach_copy_(self._averages, self._weights)
        else:
            torch._foreach_lerp_(self._averages, self._weights, self._factor)
        if self._counts:
            torch._foreach_copy_(self._average_counts, self._counts)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that `update` changes."""
        return [*self._averages, *self._average_counts]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run."""
        named = {f"{_PREFIX}{name}": value for name, value in self.model.state_dict().items()}
        return {_COUNT: torch.tensor(self._steps), **named}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state that `state_dict` returned."""
        weights = {name.removeprefix(_PREFIX): value for name, value in state.items() if name != _COUNT}
        self.model.load_state_dict(weights)
        self._steps = int(state[_COUNT])


def _tensors(model: QuadrantClassifier) -> list[Tensor]:
    return [value.detach() for value in chain(model.parameters(), model.buffers())]
