"""Means over channels as convolutions."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.channel_mean_to_conv import ChannelMeanToConv


class Norm(nn.Module):
    """As video autoencoders normalise."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


class Mean(nn.Module):
    def __init__(self, *axes, keep=True, dtype=None):
        super().__init__()
        self.axes, self.keep, self.dtype = axes, keep, dtype

    def forward(self, x):
        return x.mean(self.axes, keepdim=self.keep, dtype=self.dtype)


@pytest.mark.parametrize("batch", [1, 3])
def test_in_a_norm(check_pass, batch):
    x = torch.randn(batch, 6, 4, 5)
    check_pass(ChannelMeanToConv(), Norm(), x, before={"aten.mean": 1}, after={"aten.mean": 0, "aten.conv2d": 1})


@pytest.mark.parametrize("axis", [1, -3])
def test_it_may_be_the_output(check_pass, axis):
    check_pass(ChannelMeanToConv(), Mean(axis), torch.randn(2, 6, 4, 5), after={"aten.conv2d": 1})


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (Mean(1), (2, 6, 5), "3 axes"),
        (Mean(1, dtype=torch.float64), (2, 6, 4, 5), "another precision"),
        (Mean(2, 3), (2, 6, 4, 5), None),
        (Mean(1, keep=False), (2, 6, 4, 5), None),
    ],
)
def test_other_means_stay(check_pass, module, shape, reason):
    result = check_pass(ChannelMeanToConv(), module, torch.randn(shape), modified=False)
    assert [reason in one.reason for one in result.declined] == ([] if reason is None else [True])
