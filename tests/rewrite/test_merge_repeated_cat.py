"""Convolutions and norms over a value concatenated with itself."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.merge_repeated_cat import MergeRepeatedCat
from edgegen.students.networks.unet import ResnetBlock, UNet, UNetConfig

X = torch.randn(1, 4, 5, 5)


class Twice(nn.Module):
    def __init__(self, read, axis=1, parts=2):
        super().__init__()
        self.read, self.axis, self.parts = read, axis, parts

    def forward(self, x):
        return self.read(torch.cat([x] * self.parts, self.axis))


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_may_be_the_output(check_pass, bias):
    check_pass(MergeRepeatedCat(), Twice(nn.Conv2d(8, 6, 3, bias=bias)), X, after={"aten.cat": 0, "aten.conv2d": 1})


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_becomes_two(check_pass, affine):
    module = Twice(nn.GroupNorm(4, 8, affine=affine))
    if affine:
        nn.init.normal_(module.read.weight)
        nn.init.normal_(module.read.bias)
    check_pass(MergeRepeatedCat(), module, X, after={"aten.cat": 1, "aten.group_norm": 2})


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ResnetBlock(8, 6, 8, 2)

    def forward(self, x):
        return self.block(torch.cat([x, x], 1), torch.ones(1, 8))


def test_a_resnet_block_reads_it_twice(check_pass):
    check_pass(MergeRepeatedCat(), Block(), X, after={"aten.cat": 1, "aten.group_norm": 3})


def test_the_first_skip_of_a_unet(check_pass):
    config = UNetConfig(sample_size=4, block_out_channels=(8,), cross_attention=(False,), norm_num_groups=4)
    given = torch.randn(1, 4, 4, 4), torch.tensor([3.0]), torch.randn(1, 2, 768)
    check_pass(MergeRepeatedCat(), UNet(config), *given)


class Computed(Twice):
    def forward(self, x):
        return nn.functional.conv2d(torch.cat([x, x], 1), self.read.weight * x.mean())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Twice(nn.Conv2d(4, 6, 3), axis=2), "along the channels"),
        (Twice(nn.Conv2d(12, 6, 3), parts=3), "not two"),
        (Twice(nn.Conv2d(8, 6, 3, groups=2)), "grouped"),
        (Twice(nn.GroupNorm(1, 8)), "both halves"),
        (Twice(nn.ReLU()), "no convolution"),
        (Twice(nn.Identity()), "no convolution"),
        (Computed(nn.Conv2d(8, 6, 3)), "computed"),
    ],
)
def test_declines(check_pass, module, reason):
    result = check_pass(MergeRepeatedCat(), module, X, modified=False)
    assert reason in result.declined[0].reason


class Distinct(nn.Module):
    def forward(self, x):
        return torch.cat([x, x + 1], 1)


def test_two_values_are_no_match(check_pass):
    assert not check_pass(MergeRepeatedCat(), Distinct(), X, modified=False).declined
