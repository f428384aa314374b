"""Ensembles: several runs, or several views of one, that judge a quadrant together and travel as one model.

For a quadrant, member m of M and view v of V (the quadrant as it is, and flipped where asked for) give probabilities
p_mv, a softmax at the member's own temperature; p_m is their mean over the views, p that over the members as well.

- ``soft``: the ensemble's probabilities are p.
- ``hard``: every member casts a vote, for the class with its largest p_m (the first of equal ones). With n_c votes the
  ensemble's probability of class c is (n_c + w p_c) / (M + w), w = `MEAN_VOTE`: the share of the votes, but that p
  counts as a hundredth of a vote. That never outweighs one: it decides between equal numbers of votes and nowhere else.

Logits are the logarithms of these, so that their softmax at the temperature 1 gives the probabilities back, and their
largest is the decision. The quadrants of a frame are joined by the contract's rule, as for any model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echoquad_train.networks.backbones import BACKBONES
from echoquad_train.networks.classifier import QuadrantClassifier

__all__ = ["MEAN_VOTE", "VOTES", "EnsembleClassifier", "EnsembleVote", "views_of"]

EnsembleVote = Literal["soft", "hard"]
VOTES: Final[tuple[EnsembleVote, ...]] = get_args(EnsembleVote)

MEAN_VOTE: Final = 0.01
"""What the mean probabilities count in a hard vote, in votes. In float32 differences of p below 1e-5 are lost by it."""

_LEAST: Final = 1e-30  # of a probability whose logarithm is taken; float32 has numbers down to 1e-38


class EnsembleClassifier(nn.Module):
    """Several classifiers that judge together.

    Parameters
    ----------
    members
        One or more, of the same classes, input size and normalisation.
    temperatures
        By which each one's logits are divided.
    vote
        ``soft`` or ``hard``; see the module.
    flip
        Whether each also judges the quadrant flipped left to right.

    Attributes
    ----------
    name
        The backbone that tells whether all of it may run in mixed precision.
    """

    def __init__(
        self,
        members: Sequence[QuadrantClassifier],
        temperatures: Sequence[float],
        vote: EnsembleVote = "soft",
        flip: bool = False,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.temperatures, self.vote, self.flip = tuple(temperatures), vote, flip
        names = [member.name for member in members]
        self.name = next((name for name in names if not BACKBONES[name].mixed_on_cpu), names[0])

    def forward(self, quadrants: Tensor) -> Tensor:
        """Give logits, float32 [N, C], for grey levels 0 to 255, uint8 or float [N, 1, S, S]."""
        seen = views_of(quadrants, self.flip)
        return self.join([member(seen) for member in self.members])

    def join(self, answers: Sequence[Tensor]) -> Tensor:
        """Join the members' logits, float [V * N, C] each, the views one after the other, to float32 [N, C]."""
        views = 2 if self.flip else 1
        # Logarithms all the way: a probability too small for float32 has one.
        each = torch.stack(
            [
                F.log_softmax(logits.float() / temperature, dim=1)
                for logits, temperature in zip(answers, self.temperatures, strict=True)
            ]
        )
        by_member = _log_mean(each.reshape(len(answers), views, -1, each.shape[2]), 1)
        mean = _log_mean(by_member, 0)
        if self.vote == "soft":
            return mean
        ballots = by_member.argmax(dim=2, keepdim=True) == torch.arange(mean.shape[1], device=mean.device)
        score = ballots.float().sum(dim=0) + MEAN_VOTE * mean.exp()
        return (score / (len(answers) + MEAN_VOTE)).clamp(min=_LEAST).log()


def views_of(quadrants: Tensor, flip: bool) -> Tensor:
    """Give the views of quadrants, [N, 1, S, S]: themselves, and where asked for behind them the same, flipped.

    One batch, not one for each: every network runs once, and its weights stand in an exported graph once.
    """
    return torch.cat([quadrants, quadrants.flip(3)]) if flip else quadrants


def _log_mean(logarithms: Tensor, dim: int) -> Tensor:
    """Give the logarithm of the mean of what these are logarithms of."""
    count = logarithms.shape[dim]
    return logarithms.squeeze(dim) if count == 1 else torch.logsumexp(logarithms, dim) - math.log(count)
