"""Folding: the grey channel is not replicated at run time.

The classifier is trained on grey levels replicated to three channels. A convolution over three equal channels is
the convolution over one whose weights are their sum, at the zero-padded border too: all channels are normalised alike.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["fold_first_convolution", "sum_input_channels"]


def sum_input_channels(convolution: nn.Conv2d) -> nn.Conv2d:
    """Make the convolution over one channel that equals `convolution` over equal channels.

    The sum is taken in float64, so that only the last rounding differs.
    """
    folded = nn.Conv2d(
        1,
        convolution.out_channels,
        convolution.kernel_size,  # type: ignore[arg-type]  # torch annotates them as tuples of any length
        convolution.stride,  # type: ignore[arg-type]
        convolution.padding,  # type: ignore[arg-type]
        convolution.dilation,  # type: ignore[arg-type]
        bias=convolution.bias is not None,
        padding_mode=convolution.padding_mode,
    )
    with torch.no_grad():
        folded.weight.copy_(convolution.weight.double().sum(dim=1, keepdim=True))
        if convolution.bias is not None and folded.bias is not None:
            folded.bias.copy_(convolution.bias)
    return folded


def fold_first_convolution(body: nn.Module) -> nn.Module:
    """Replace a backbone's first convolution by the one over a single channel, in place; gives the backbone back.

    Raises
    ------
    ValueError
        If it has no convolution over three channels to begin with.
    """
    for name, module in body.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != 3 or module.groups != 1:
                break
            parent, _, child = name.rpartition(".")
            setattr(body.get_submodule(parent), child, sum_input_channels(module))
            return body
    raise ValueError("the backbone does not begin with a convolution over three channels")
