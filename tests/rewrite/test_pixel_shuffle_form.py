"""Pixel shuffles as calls, as views and a permute, as convolutions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgegen.rewrite.base import census
from edgegen.rewrite.pixel_shuffle_form import PixelShuffleForm


class Wrap(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def shuffle(x):
    b, c, h, w = x.shape
    return x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


def unshuffle(x):
    b, c, h, w = x.shape
    return x.view(b, c, h // 3, 3, w // 3, 3).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


@pytest.mark.parametrize("batch", [1, 2])
def test_views_and_a_permute_are_recognised(check_pass, batch):
    result = check_pass(PixelShuffleForm("call"), Wrap(shuffle), torch.randn(batch, 8, 3, 5))
    assert census(result.program) == {"aten.pixel_shuffle": 1}
    result = check_pass(PixelShuffleForm("call"), Wrap(lambda x: unshuffle(x) * 2), torch.randn(batch, 2, 6, 9))
    assert census(result.program) == {"aten.pixel_unshuffle": 1, "aten.mul": 1}


def test_other_rearrangements_are_not(check_pass):
    def patches(x):  # space to depth with the pixel's place before the channel
        return x.view(2, 4, 3, 2, 3, 2).permute(0, 3, 5, 1, 2, 4).reshape(2, 16, 3, 3)

    check_pass(PixelShuffleForm("call"), Wrap(patches), torch.randn(2, 4, 6, 6), modified=False)


@pytest.mark.parametrize("form", ["reshape", "conv"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: F.pixel_shuffle(x, 2), (8, 3, 5)),
        (lambda x: F.pixel_shuffle(x.relu(), 3) + 1, (9, 2, 2)),
        (lambda x: F.pixel_unshuffle(x, 2), (3, 4, 6)),
    ],
)
def test_a_call_becomes_what_it_is_made_of(check_pass, form, batch, function, shape):
    gone = {"aten.pixel_shuffle": 0, "aten.pixel_unshuffle": 0}
    result = check_pass(PixelShuffleForm(form), Wrap(function), torch.randn(batch, *shape), after=gone)
    assert all(node.meta["val"].dim() <= 5 for node in result.program.graph.nodes if node.op == "call_function")


def test_forms_lead_back(check_pass):
    x = torch.randn(2, 8, 3, 5)
    apart = check_pass(PixelShuffleForm("reshape"), Wrap(lambda x: F.pixel_shuffle(x, 2)), x)
    check_pass(PixelShuffleForm("call"), apart.program, x, after={"aten.pixel_shuffle": 1, "aten.reshape": 0})


def test_many_channels_and_other_ranks_stay(check_pass):
    module = Wrap(lambda x: F.pixel_shuffle(x, 2))
    result = check_pass(PixelShuffleForm("conv", 2), module, torch.randn(1, 16, 2, 2), modified=False)
    assert "costly" in result.declined[0].reason
    result = check_pass(PixelShuffleForm(), module, torch.randn(16, 2, 2), modified=False)
    assert "rank 4" in result.declined[0].reason
