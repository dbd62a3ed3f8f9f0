"""Batch norms and constant factors go into the weights of what is before or after them."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.fold_batch_norm import FoldBatchNorm
from edgegen.rewrite.fold_scale import FoldScale


def norm(kind, channels):
    made = kind(channels)
    with torch.no_grad():
        for value in (made.running_mean, made.weight, made.bias):
            value.normal_()
        made.running_var.uniform_(0.5, 2.0)
    return made


@pytest.mark.parametrize(
    ("module", "kind", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d, (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d, (2, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (2, 4, 5)),
        (nn.Conv3d(4, 6, 3), nn.BatchNorm3d, (2, 4, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d, (2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d, (2, 4, 5, 5)),
        (nn.Linear(4, 6), nn.BatchNorm1d, (3, 4)),
    ],
)
def test_a_batch_norm_goes_into_what_is_before_it(check_pass, module, kind, shape):
    whole = nn.Sequential(module, norm(kind, 6))
    result = check_pass(FoldBatchNorm(), whole, torch.randn(shape), after={"aten.batch_norm": 0, "aten.mul": 0})
    assert len(result.program.state_dict) == 2


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), norm(nn.BatchNorm2d, 4)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


@pytest.mark.parametrize("module", [Shared(), norm(nn.BatchNorm2d, 4), nn.BatchNorm2d(4, affine=False)])
def test_with_nothing_to_go_into_it_is_a_product_and_a_sum(check_pass, module):
    check_pass(FoldBatchNorm(), module, torch.randn(2, 4, 5, 5), after={"aten.batch_norm": 0, "aten.mul": 1})


def test_channels_of_tokens_are_not_the_linear_s(check_pass):
    module = nn.Sequential(nn.Linear(4, 6), norm(nn.BatchNorm1d, 5))
    check_pass(FoldBatchNorm(), module, torch.randn(2, 5, 4), after={"aten.linear": 1, "aten.mul": 1})


class Statistics(nn.Module):
    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


def test_a_batch_norm_of_the_batch_s_own_statistics_stays(check_pass):
    result = check_pass(FoldBatchNorm(), Statistics(), torch.randn(4, 3), modified=False)
    assert "trains" in result.declined[0].reason


class Computed(nn.Module):
    def forward(self, x, mean):
        return nn.functional.batch_norm(x, mean, mean.abs())


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, eps=0.0)
        self.norm.running_var.zero_()

    def forward(self, x):
        return self.norm(x)


def test_statistics_that_cannot_be_folded_stay(check_pass):
    result = check_pass(FoldBatchNorm(), Computed(), torch.randn(4, 3), torch.randn(3), modified=False)
    assert "computed" in result.declined[0].reason
    result = FoldBatchNorm()(torch.export.export(Broken().eval(), (torch.randn(4, 3),)))
    assert not result.modified and "finite" in result.declined[0].reason


class Scaled(nn.Module):
    def __init__(self, product, shape=None, divide=False):
        super().__init__()
        self.product = product
        self.factor = 0.3 if shape is None else nn.Parameter(torch.rand(shape) + 0.5)
        self.divide = divide

    def forward(self, x):
        return self.product(x / self.factor if self.divide else x * self.factor)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize(
    ("module", "factor", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), (1, 4, 1, 1), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 1, 1), (2, 4, 5, 5)),
        (nn.Conv2d(4, 4, 3, groups=4), None, (2, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3), (4, 1), (2, 4, 5)),
        (nn.Linear(4, 6), (4,), (2, 3, 4)),
        (nn.Linear(4, 6, bias=False), None, (4,)),
    ],
)
def test_a_factor_of_the_input_goes_into_the_weight(check_pass, module, factor, shape, divide):
    after = {"aten.mul": 0, "aten.div": 0}
    check_pass(FoldScale(), Scaled(module, factor, divide), torch.randn(shape), after=after)


class Reads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.factor = nn.Parameter(torch.rand(2, 1) + 0.5)
        self.kind = kind

    def forward(self, x):
        if self.kind == "twice":
            y = x * 2.0
            return self.linear(y) + y
        if self.kind == "divides":
            return self.linear(self.factor / x)
        if self.kind == "tied":
            return self.linear(x * 2.0) + self.linear(x)
        if self.kind == "token":
            return self.linear(x * self.factor)
        if self.kind == "infinite":
            return self.linear(x * float("inf"))
        return self.linear(x * x)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("twice", "something else"),
        ("divides", "divides"),
        ("tied", "another call"),
        ("token", "one value a channel"),
        ("infinite", "finite"),
        ("square", "neither"),
    ],
)
def test_other_factors_stay(check_pass, kind, why):
    result = FoldScale()(torch.export.export(Reads(kind), (torch.rand(2, 4) + 1,)))
    assert not result.modified
    assert any(why in one.reason for one in result.declined)
