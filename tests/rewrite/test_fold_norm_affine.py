"""A norm's weight and bias move into the products that read it."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.fold_norm_affine import FoldNormAffine


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn_like(weight))
    return module


class Block(nn.Module):
    """A norm and two products, one without bias."""

    def __init__(self, norm, product):
        super().__init__()
        self.norm = norm
        self.a, self.b = product(False), product(True)

    def forward(self, x):
        y = self.norm(x * 2)
        return self.a(y), torch.relu(self.b(y))


def linear(bias, **options):
    return nn.Linear(8, 5, bias=bias, **options)


def pointwise(bias, **options):
    return nn.Conv2d(8, 5, 1, bias=bias, **options)


@pytest.mark.parametrize(
    ("norm", "product", "x"),
    [
        (nn.LayerNorm(8), linear, torch.randn(2, 3, 8)),
        (nn.LayerNorm(8, bias=False), linear, torch.randn(2, 3, 8)),
        (nn.RMSNorm(8), linear, torch.randn(2, 3, 8)),
        (nn.GroupNorm(4, 8), pointwise, torch.randn(2, 8, 3, 4)),
    ],
)
def test_the_readers_take_it_over(check_pass, norm, product, x):
    result = check_pass(FoldNormAffine(), randomise(Block(norm, product)), x)
    assert not any("norm" in name.split(".")[0] for name in result.program.state_dict)


class Feeds(nn.Module):
    def __init__(self, twice):
        super().__init__()
        self.norm, self.linear, self.twice = nn.LayerNorm(8), nn.Linear(8, 8), twice

    def forward(self, x):
        y = self.norm(x)
        return (self.linear(y), y) if self.twice else self.linear(y)


def test_a_reader_may_feed_the_output(check_pass):
    check_pass(FoldNormAffine(), randomise(Feeds(False)), torch.randn(1, 3, 8))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.norm(x)) + self.linear(x)


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.norm(x), self.linear.weight * x.mean())


def conv(size, **options):
    return lambda bias: nn.Conv2d(8, 8, size, bias=bias, **options)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Feeds(True), "`output` reads it"),
        (Shared(), "read by another call"),
        (Computed(), "is computed"),
        (Block(nn.LayerNorm([3, 8]), linear), "last 2 axes"),
        (Block(nn.GroupNorm(2, 8), conv(3)), "no 1x1 convolution"),
        (Block(nn.GroupNorm(2, 8), conv(1, padding=1)), "no 1x1 convolution"),
        (Block(nn.GroupNorm(2, 8), conv(1, groups=2)), "no 1x1 convolution"),
    ],
)
def test_declines(check_pass, module, reason):
    x = torch.randn(1, 8, 4, 4) if isinstance(module, Block) and "GroupNorm" in str(module) else torch.randn(1, 3, 8)
    result = check_pass(FoldNormAffine(), module, x, modified=False)
    assert reason in result.declined[0].reason


def test_a_norm_without_affine_is_no_near_miss(check_pass):
    module = Block(nn.LayerNorm(8, elementwise_affine=False), linear)
    assert not check_pass(FoldNormAffine(), module, torch.randn(1, 3, 8), modified=False).declined
