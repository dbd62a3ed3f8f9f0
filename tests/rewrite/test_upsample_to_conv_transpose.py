"""Nearest upsampling by two and a 3x3 convolution are one transposed convolution, borders included."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.upsample_to_conv_transpose import UpsampleToConvTranspose, transposed_kernel

ONE = UpsampleToConvTranspose()


class Up(nn.Module):
    def __init__(self, bias=True, by=2.0, size=None, mode="nearest", **conv):
        super().__init__()
        self.by, self.size, self.mode = by, size, mode
        self.conv = nn.Conv2d(4, 6, **{"kernel_size": 3, "padding": 1, "bias": bias, **conv})

    def forward(self, x):
        by = None if self.size else self.by
        return self.conv(nn.functional.interpolate(x, size=self.size, scale_factor=by, mode=self.mode))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [None, (6, 10)])
def test_it_becomes_one_call_whose_result_is_the_output(check_pass, bias, size):
    after = {"aten.conv2d": 0, "aten.upsample_nearest2d": 0, "aten.conv_transpose2d": 1}
    check_pass(ONE, Up(bias, size=size), torch.randn(2, 4, 3, 5), after=after)


def test_every_border_pixel_is_exact():
    """Small integers: sums of them are exact in fp32, so nothing but equal numbers will do."""
    torch.manual_seed(0)
    for height, width in [(1, 1), (1, 4), (3, 2), (5, 5)]:
        x, weight = torch.randint(-9, 10, (2, 3, height, width)).float(), torch.randint(-9, 10, (5, 3, 3, 3)).float()
        expected = nn.functional.conv2d(nn.functional.interpolate(x, scale_factor=2.0), weight, padding=1)
        found = nn.functional.conv_transpose2d(x, transposed_kernel(weight), stride=2, padding=1)
        assert torch.equal(expected, found)


class ReadTwice(Up):
    def forward(self, x):
        up = nn.functional.interpolate(x, scale_factor=2.0)
        return self.conv(up), up


class Shared(Up):
    def forward(self, x):
        up = self.conv(nn.functional.interpolate(x, scale_factor=2.0))
        return self.conv(up[:, :4])


class Computed(Up):
    def forward(self, x):
        return nn.functional.conv2d(
            nn.functional.interpolate(x, scale_factor=2.0), self.conv.weight * x.mean(), padding=1
        )


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Up(by=3.0), "not by two"),
        (Up(size=(6, 9)), "not by two"),
        (Up(kernel_size=5, padding=2), "not 3x3"),
        (Up(padding=0), "not 3x3"),
        (Up(stride=2), "not 3x3"),
        (Up(dilation=2, padding=1), "not 3x3"),
        (Up(groups=2), "not 3x3"),
        (ReadTwice(), "something else reads"),
        (Shared(), "another call"),
        (Computed(), "computed"),
    ],
)
def test_declines(check_pass, module, reason):
    result = check_pass(ONE, module, torch.randn(1, 4, 3, 5), modified=False)
    assert reason in result.declined[0].reason


def test_another_interpolation_is_no_match(check_pass):
    assert not check_pass(ONE, Up(mode="bilinear"), torch.randn(1, 4, 3, 5), modified=False).declined
