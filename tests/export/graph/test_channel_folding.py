"""Channel folding: one grey channel instead of three equal ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from echoquad_export.graph.channel_folding import fold_first_convolution, sum_input_channels
from echoquad_train.networks.backbones import BACKBONES, build_backbone


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 4),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 4),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    seed=st.integers(0, 10**6),
)
def test_folded_convolution_equals_the_one_over_three_equal_channels(
    channels: int,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    bias: bool,
    mode: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    convolution = nn.Conv2d(
        3,
        channels,
        kernel,
        stride,
        padding,
        dilation,
        bias=bias,
        padding_mode=mode,  # type: ignore[arg-type]
    )
    grey = torch.rand(2, 1, 13, 11, generator=generator) * 2 - 1
    with torch.inference_mode():
        expected = convolution(grey.expand(-1, 3, -1, -1))
        found = sum_input_channels(convolution)(grey)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # at the padded border too


def test_channels_are_summed_in_float64() -> None:
    convolution = nn.Conv2d(3, 1, 1, bias=False)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([1e8, 1.0, -1e8]).view(1, 3, 1, 1))
    assert sum_input_channels(convolution).weight.item() == 1.0  # in float32 it would be 0


def test_nested_first_convolution_is_replaced() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3))
    body = nn.Sequential(nn.Identity(), inner)
    second = inner[1]
    assert fold_first_convolution(body) is body
    assert inner[0].in_channels == 1 and inner[1] is second and second.in_channels == 4


@pytest.mark.parametrize("name", BACKBONES)
def test_each_backbone_can_be_folded(name: str) -> None:
    torch.manual_seed(1)
    body, _ = build_backbone(name, 64)
    grey = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        expected = body.eval()(grey.expand(-1, 3, -1, -1))
        found = fold_first_convolution(body)(grey)
    assert next(body.parameters()).shape[1] == 1
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "body",
    [
        nn.Sequential(nn.Linear(3, 4)),
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3)),
        nn.Conv2d(3, 3, 3, groups=3),
    ],
)
def test_other_first_layers_raise_value_error(body: nn.Module) -> None:
    with pytest.raises(ValueError, match="does not begin with a convolution over three channels"):
        fold_first_convolution(body)
