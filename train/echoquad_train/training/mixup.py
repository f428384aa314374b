"""Mixup: some quadrants of a batch are blended with another one, and so are the losses of their labels.

It keeps a network from being certain about few training frames. H. Zhang et al., "mixup: Beyond Empirical Risk
Minimization", arXiv:1710.09412, blend every image, in a proportion of a Beta distribution. Here the proportion is
uniform, their Beta(1, 1), and a recipe states the probability. The partners are those of the reversed batch, which is
in random order. Each process of torchrun blends within its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["blend", "blend_losses", "draw_mixup"]

SHARE = "mixup_share"


def draw_mixup(count: int, probability: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the share of each quadrant's own pixels, float32 [count], 1 where it is not blended; {} without mixup."""
    if not probability:
        return {}
    chance, share = (torch.rand(count, generator=generator, device=generator.device) for _ in range(2))
    return {SHARE: torch.where(chance < probability, share, 1.0)}


def blend(images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Blend images, float32 [B, 1, S, S], with those of the reversed batch, by the shares of `draw_mixup`."""
    if SHARE not in draws:
        return images
    share = draws[SHARE][:, None, None, None]
    return share * images + (1 - share) * images.flip(0)


def blend_losses(losses: Callable[[Tensor], Tensor], labels: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the losses of a blended batch.

    Parameters
    ----------
    losses
        Returns the loss of each row, float32 [B], for labels, int64 [B].
    labels
        int64 [B], of the images before they were blended.
    draws
        From `draw_mixup`.
    """
    own = losses(labels)
    if SHARE not in draws:
        return own.sum()
    share = draws[SHARE]
    return (share * own + (1 - share) * losses(labels.flip(0))).sum()
