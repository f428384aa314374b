"""Ensembles: several runs, or several views of one (test-time augmentation), combined into one model.

For a quadrant, member m of M and view v of V (the original, and optionally the flipped quadrant) have probabilities
p_mv, a softmax at the member's temperature. p_m is their mean over the views, p the mean over views and members.

- ``soft``: the ensemble's probabilities are p.
- ``hard``: every member votes for the class with its largest p_m (the first in a tie). With n_c votes, the probability
  of class c is (n_c + w p_c) / (M + w), w = `MEAN_VOTE`: the fraction of votes, plus p as a hundredth of a vote. That
  only decides between classes with equal numbers of votes.

Logits are the logarithms of these probabilities: their softmax at temperature 1 restores the probabilities. The
quadrants of a frame vote by the contract's rule, as for any model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echoquad_train.networks.classifier import QuadrantClassifier

__all__ = ["MEAN_VOTE", "VOTES", "EnsembleClassifier", "EnsembleVote", "views_of"]

EnsembleVote = Literal["soft", "hard"]
VOTES: Final[tuple[EnsembleVote, ...]] = get_args(EnsembleVote)

MEAN_VOTE: Final = 0.01
"""Weight of the mean probabilities in a hard vote, in votes. In float32 it loses differences of p below 1e-5."""

_MIN_PROBABILITY: Final = 1e-30  # before the logarithm; float32 goes down to 1e-38


class EnsembleClassifier(nn.Module):
    """Several classifiers that vote on each quadrant.

    Parameters
    ----------
    members
        One or more classifiers with the same classes, input size and normalisation.
    temperatures
        Divide the logits of each member.
    vote
        ``soft`` or ``hard``; see the module.
    flip_tta
        Test-time augmentation: whether each member also classifies the quadrant flipped left to right.

    Attributes
    ----------
    name
        The backbone that decides whether the ensemble runs in mixed precision.
    """

    def __init__(
        self,
        members: Sequence[QuadrantClassifier],
        temperatures: Sequence[float],
        vote: EnsembleVote = "soft",
        flip_tta: bool = False,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.temperatures, self.vote, self.flip_tta = tuple(temperatures), vote, flip_tta
        self.name = next((member.name for member in members if not member.parts.mixed_on_cpu), members[0].name)

    def forward(self, quadrants: Tensor) -> Tensor:
        """Return logits, float32 [N, C], for grey levels 0 to 255, uint8 or float [N, 1, S, S]."""
        views = views_of(quadrants, self.flip_tta)
        return self.join([member(views) for member in self.members])

    def join(self, member_logits: Sequence[Tensor]) -> Tensor:
        """Combine the members' logits, float [V * N, C] each, view after view, to float32 [N, C]."""
        views = 2 if self.flip_tta else 1
        # Logarithms throughout: they represent probabilities that are too small for float32.
        logarithms = torch.stack(
            [
                F.log_softmax(logits.float() / temperature, dim=1)
                for logits, temperature in zip(member_logits, self.temperatures, strict=True)
            ]
        )
        by_member = _log_mean(logarithms.reshape(len(member_logits), views, -1, logarithms.shape[2]), 1)
        mean = _log_mean(by_member, 0)
        if self.vote == "soft":
            return mean
        ballots = by_member.argmax(dim=2, keepdim=True) == torch.arange(mean.shape[1], device=mean.device)
        score = ballots.float().sum(dim=0) + MEAN_VOTE * mean.exp()
        return (score / (len(member_logits) + MEAN_VOTE)).clamp(min=_MIN_PROBABILITY).log()


def views_of(quadrants: Tensor, flip_tta: bool) -> Tensor:
    """Return the views of quadrants, [N, 1, S, S]: with `flip_tta`, the flipped quadrants follow the originals.

    All views are one batch, so that every network runs once and an exported graph contains its weights once.
    """
    return torch.cat([quadrants, quadrants.flip(3)]) if flip_tta else quadrants


def _log_mean(logarithms: Tensor, dim: int) -> Tensor:
    """Return the logarithm of the mean of exp(logarithms)."""
    count = logarithms.shape[dim]
    return logarithms.squeeze(dim) if count == 1 else torch.logsumexp(logarithms, dim) - math.log(count)
