"""Channel folding: the exported network reads one grey channel instead of three copies of it.

The classifier is trained on grey levels replicated to three channels. A convolution over three equal channels equals
one over a single channel with the sum of their weights. This holds at the zero-padded border too, because all channels
are normalised alike.
"""

from __future__ import annotations

import copy

from torch import nn

__all__ = ["fold_first_convolution", "sum_input_channels"]


def sum_input_channels(convolution: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution over one channel that equals `convolution` over equal channels.

    The sum is computed in float64, so that only the final rounding differs.
    """
    folded = copy.deepcopy(convolution)  # of the same class: timm's may pad as TensorFlow does
    folded.in_channels = 1
    folded.weight = nn.Parameter(convolution.weight.double().sum(dim=1, keepdim=True).to(convolution.weight.dtype))
    return folded


def fold_first_convolution(body: nn.Module) -> nn.Module:
    """Replace a backbone's first convolution by one over a single channel, in place, and return the backbone.

    Raises
    ------
    ValueError
        If the backbone does not begin with a convolution over three channels.
    """
    for name, module in body.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != 3 or module.groups != 1:
                break
            parent, _, child = name.rpartition(".")
            setattr(body.get_submodule(parent), child, sum_input_channels(module))
            return body
    raise ValueError("the backbone does not begin with a convolution over three channels")
