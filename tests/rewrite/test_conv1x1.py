"""Linears and 1x1 convolutions into each other, where tokens and images meet or everywhere."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.base import census
from edgegen.rewrite.conv1x1_to_linear import Conv1x1ToLinear
from edgegen.rewrite.linear_to_conv1x1 import LinearToConv1x1
from edgegen.rewrite.sink_transposes import SinkTransposes


class FeedForward(nn.Module):
    """Tokens of an image, two linears with what lies between, and back."""

    def __init__(self, bias=True):
        super().__init__()
        self.first, self.second = nn.Linear(4, 16, bias=bias), nn.Linear(8, 4, bias=bias)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        value, gate = self.first(tokens).chunk(2, dim=-1)
        tokens = tokens + self.second(value * nn.functional.gelu(gate))
        return tokens.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("bias", [True, False])
def test_linears_over_tokens_of_an_image_become_convolutions(check_pass, bias):
    x = torch.randn(2, 4, 3, 5)
    after = {"aten.conv2d": 1, "aten.linear": 1}  # the second's tokens come from a product: no image is in sight
    result = check_pass(LinearToConv1x1(), FeedForward(bias), x, before={"aten.linear": 2}, after=after)
    assert "no image" in result.declined[0].reason
    everywhere = check_pass(LinearToConv1x1("everywhere"), FeedForward(bias), x, after={"aten.linear": 0})
    assert census(everywhere.program)["aten.conv2d"] == 2


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        y = self.linear(x.permute(0, 2, 3, 1))
        return self.last(nn.functional.silu(y)).permute(0, 3, 1, 2)


def test_what_that_adds_is_cancelled_by_sinking(check_pass):
    result = check_pass(LinearToConv1x1(), Mixer(), torch.randn(2, 4, 3, 5), after={"aten.linear": 0})
    result = check_pass(SinkTransposes(), result.program, torch.randn(2, 4, 3, 5), after={"aten.permute": 0})
    assert census(result.program) == {"aten.conv2d": 2, "aten.silu": 1}


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 4), (2, 3, 5, 4)])
def test_everywhere_means_ranks_two_to_four(check_pass, shape):
    check_pass(LinearToConv1x1("everywhere"), nn.Linear(4, 3), torch.randn(shape), after={"aten.conv2d": 1})
    check_pass(LinearToConv1x1(), nn.Linear(4, 3), torch.randn(shape), modified=False)


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * x.mean())


def test_a_computed_weight_stays(check_pass):
    result = check_pass(LinearToConv1x1("everywhere"), Computed(), torch.randn(2, 4), modified=False)
    assert "computed" in result.declined[0].reason
    result = check_pass(LinearToConv1x1("everywhere"), nn.Linear(4, 3), torch.randn(1, 1, 2, 3, 4), modified=False)
    assert "shape" in result.declined[0].reason


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in, self.proj_out = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1, bias=False)

    def forward(self, x):
        tokens = self.proj_in(x).flatten(2).transpose(1, 2)
        tokens = nn.functional.layer_norm(tokens, (6,))
        return x + self.proj_out(tokens.transpose(1, 2).reshape(x.shape[0], 6, *x.shape[2:]))


def test_projections_of_tokens_become_linears(check_pass):
    x = torch.randn(2, 4, 3, 5)
    result = check_pass(Conv1x1ToLinear(), Transformer(), x, after={"aten.conv2d": 0, "aten.linear": 2})
    result = check_pass(SinkTransposes(), result.program, x)
    assert census(result.program)["aten.transpose"] == 2


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Conv2d(4, 4, 1, stride=2), "stride"),
        (nn.Conv2d(4, 4, 1, padding=1), "padding"),
        (nn.Conv2d(4, 4, 1, groups=2), "groups"),
        (nn.Conv2d(4, 4, 3), "kernel"),
    ],
)
def test_other_convolutions_stay(check_pass, module, why):
    result = check_pass(Conv1x1ToLinear("everywhere"), module, torch.randn(2, 4, 5, 5), modified=False)
    assert why in result.declined[0].reason


def test_a_convolution_between_images_stays_unless_asked(check_pass):
    x = torch.randn(2, 4, 3, 5)
    result = check_pass(Conv1x1ToLinear(), nn.Conv2d(4, 3, 1), x, modified=False)
    assert "image comes in" in result.declined[0].reason
    check_pass(Conv1x1ToLinear("everywhere"), nn.Conv2d(4, 3, 1), x, after={"aten.linear": 1})
