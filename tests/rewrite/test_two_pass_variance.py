"""E[x^2] - E[x]^2 in whatever way it is written."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.two_pass_variance import TwoPassVariance


class Powers(nn.Module):
    def forward(self, x):
        return x.pow(2).mean((1, 2), keepdim=True) - x.mean((1, 2), keepdim=True).pow(2)


class Products(nn.Module):
    def forward(self, x):
        mean = x.mean(-1)
        return (x * x).mean(-1) - mean * mean + mean


class Squares(nn.Module):
    def forward(self, x):
        return torch.rsqrt(torch.square(x).mean(-1) - torch.square(x.mean(-1)) + 1e-5)


@pytest.mark.parametrize("module", [Powers(), Products(), Squares()])
def test_a_difference_of_means_becomes_a_mean_of_squared_deviations(check_pass, module):
    check_pass(TwoPassVariance(), module, torch.randn(2, 3, 16) + 2, before={"aten.sub": 1}, after={"aten.pow": 0})


class OtherAxes(nn.Module):
    def forward(self, x):
        return x.pow(2).mean(1, keepdim=True) - x.mean(2, keepdim=True).pow(2)


class OtherDtype(nn.Module):
    def forward(self, x):
        return x.pow(2).mean(1, dtype=torch.float32) - x.mean(1).pow(2)


@pytest.mark.parametrize(("module", "reason"), [(OtherAxes(), "axes"), (OtherDtype(), "dtype")])
def test_other_differences_stay(check_pass, module, reason):
    result = check_pass(TwoPassVariance(), module, torch.randn(2, 3, 3), modified=False)
    assert reason in result.declined[0].reason


def test_another_value_squared_is_no_match(check_pass):
    class Other(nn.Module):
        def forward(self, x, y):
            return x.pow(2).mean(1) - y.mean(1).pow(2)

    assert not check_pass(TwoPassVariance(), Other(), torch.randn(2, 3), torch.randn(2, 3), modified=False).declined
