"""Adapters beside a linear or a convolution go into its weight; pairs that are no adapters stay."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.merge_low_rank_adapters import MergeLowRankAdapters


class Adapted(nn.Module):
    def __init__(self, base, down, up, scale=0.7, place="after"):
        super().__init__()
        self.base, self.down, self.up = base, down, up
        self.scale, self.place = scale, place

    def forward(self, x):
        if self.place == "before":
            return self.base(x) + self.up(self.down(x * self.scale))
        if self.place == "between":
            return self.up(self.down(x) * self.scale) + self.base(x)
        if self.place == "divided":
            return self.base(x) + self.up(self.down(x)) / self.scale
        if self.place == "none":
            return self.base(x) + self.up(self.down(x))
        return self.base(x) + self.scale * self.up(self.down(x))


def linears(bias=True, rank=2, inner_bias=False):
    return nn.Linear(8, 6, bias=bias), nn.Linear(8, rank, bias=inner_bias), nn.Linear(rank, 6, bias=False)


def convs(kernel=3, stride=1, padding=1, up=1, **more):
    base = nn.Conv2d(8, 6, kernel, stride, padding, **more)
    return base, nn.Conv2d(8, 2, kernel, stride, padding, bias=False), nn.Conv2d(2, 6, up, padding=up // 2, bias=False)


@pytest.mark.parametrize("place", ["after", "before", "between", "divided", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_of_a_linear_goes_into_its_weight(check_pass, place, bias):
    module = Adapted(*linears(bias), place=place)
    result = check_pass(MergeLowRankAdapters(), module, torch.randn(2, 3, 8), before={"aten.linear": 3})
    assert len(result.program.state_dict) == 1 + bias


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1)])
def test_an_adapter_of_a_convolution_goes_into_its_weight(check_pass, kernel, stride, padding):
    module = Adapted(*convs(kernel, stride, padding))
    check_pass(MergeLowRankAdapters(), module, torch.randn(1, 8, 6, 6), after={"aten.conv2d": 1, "aten.mul": 0})


class Behind(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Adapted(*linears()), nn.Linear(6, 8)
        self.third = Adapted(*linears(), scale=nn.Parameter(torch.tensor([0.3])))

    def forward(self, x):
        return self.third(self.second(self.first(x)).relu())


def test_a_scale_may_be_a_weight_and_an_adapter_anywhere(check_pass):
    check_pass(MergeLowRankAdapters(), Behind(), torch.randn(2, 8), after={"aten.linear": 3})


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = linears()

    def forward(self, x):
        down = self.down(x)
        return self.base(x) + self.up(down), down


@pytest.mark.parametrize(
    ("module", "why", "shape"),
    [
        (Adapted(*linears(rank=6)), "rank 6", (2, 8)),
        (Adapted(*linears(inner_bias=True)), "bias", (2, 8)),
        (Adapted(*convs(up=3)), "not 1x1", (1, 8, 6, 6)),
        (Adapted(*convs(dilation=1, groups=2)), "groups", (1, 8, 6, 6)),
        (Adapted(nn.Conv2d(8, 6, 1), *convs()[1:]), "another kernel", (1, 8, 6, 6)),
        (TwoReaders(), None, (2, 8)),
    ],
)
def test_what_is_no_adapter_stays(check_pass, module, why, shape):
    result = check_pass(MergeLowRankAdapters(), module, torch.randn(shape), modified=False)
    assert why is None or why in result.declined[0].reason


def test_a_tied_weight_stays(check_pass):
    module = Adapted(nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))
    tied = nn.Sequential(module, module.base)
    result = check_pass(MergeLowRankAdapters(), tied, torch.randn(2, 8), modified=False)
    assert "another call" in result.declined[0].reason
