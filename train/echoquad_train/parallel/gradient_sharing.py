"""Layers for data-parallel training whose results equal those of a single process.

Batch normalisation uses the statistics of the global batch. Dropout draws the mask of the global batch, of which each
rank takes its rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth, stochastic_depth

from echoquad_train.parallel.ranks import Share

__all__ = ["BatchShare", "share_layers"]


class BatchShare:
    """The rows of the current global batch that this rank's network processes."""

    share: Share | None = None

    def rows_of(self, draw: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Apply `draw` to ones for every row of the global batch, `shape` each, and return this rank's rows."""
        assert self.share is not None
        whole = torch.ones((self.share.total, *shape), dtype=x.dtype, device=x.device)
        rows: Tensor = draw(whole)[self.share.rows]
        return rows


def share_layers(model: nn.Module, device: torch.device) -> BatchShare:
    """Make batch normalisation and random layers work on the global batch; weights keep their names.

    Parameters
    ----------
    model
        Modified in place.
    device
        The training device. CUDA uses torch's SyncBatchNorm, which has no CPU kernel.

    Returns
    -------
    BatchShare
        Its `share` must be set before each batch.
    """
    batch = BatchShare()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Dropout):
                setattr(parent, name, _Dropout(layer, batch))
            elif isinstance(layer, StochasticDepth):
                setattr(parent, name, _StochasticDepth(layer, batch))
            elif isinstance(layer, nn.BatchNorm2d):
                if device.type == "cuda":
                    setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(layer))  # type: ignore[no-untyped-call]
                else:
                    layer.__class__ = _BatchNorm
    return batch


class _Dropout(nn.Module):
    def __init__(self, own: nn.Dropout, batch: BatchShare) -> None:
        super().__init__()
        self.p, self.batch = own.p, batch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * self.batch.rows_of(lambda ones: F.dropout(ones, self.p), x, x.shape[1:])


class _StochasticDepth(nn.Module):
    def __init__(self, own: StochasticDepth, batch: BatchShare) -> None:
        super().__init__()
        self.p, self.mode, self.batch = own.p, own.mode, batch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (1,) * (x.dim() - 1)
        return x * self.batch.rows_of(lambda ones: stochastic_depth(ones, self.p, self.mode), x, shape)


class _BatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the rows of all ranks, on the CPU. Replaces the class of existing layers."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        y, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        out: Tensor = y
        return out


class _Normalise(torch.autograd.Function):
    """Batch normalisation of a share, with sums over all ranks; S. Ioffe, C. Szegedy, arXiv:1502.03167.

    Each rank sums squares about its own mean and shifts them to the common mean: sums about zero lose precision in
    float32. T. F. Chan, G. H. Golub, R. J. LeVeque, Am. Stat. 37 (1983) 242.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised share, [B, C, H, W], and the mean and unbiased variance of the global batch, [C]."""
        values = x.float()
        count = values.numel() // values.shape[1]
        own_mean = values.sum((0, 2, 3)) / max(1, count)
        own_square = (values - own_mean[:, None, None]).square().sum((0, 2, 3))
        own = torch.cat([own_mean, own_square, own_mean.new_tensor([count])])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        table = torch.stack(parts)
        means, squares = table[:, : len(weight)], table[:, len(weight) : -1]
        counts = table[:, -1:]
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        square = (squares + counts * (means - mean).square()).sum(0)
        scale = (square / total + eps).rsqrt()
        normal = (values - mean[:, None, None]) * scale[:, None, None]
        ctx.save_for_backward(normal, weight, scale, total)
        ctx.mark_non_differentiable(mean, variance := square / (total - 1))
        y = normal * weight[:, None, None] + bias[:, None, None]
        return y.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of the share, [B, C, H, W], and this rank's gradients of weight and bias, [C]."""
        normal, weight, scale, total = ctx.saved_tensors
        wide = gradient.float()
        bias, slope = wide.sum((0, 2, 3)), (wide * normal).sum((0, 2, 3))
        sums = torch.stack([bias, slope])
        dist.all_reduce(sums)
        mean, along = (sums / total)[:, :, None, None]
        share = (wide - mean - normal * along) * (weight * scale)[:, None, None]
        return share.to(gradient.dtype), slope, bias, None
