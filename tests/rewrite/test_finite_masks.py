"""Masks that float16 does not have become finite, where a softmax alone reads them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen.rewrite.finite_masks import FiniteMasks

LOWEST = torch.finfo(torch.float32).min
HIDDEN = torch.ones(4, 4, dtype=torch.bool).triu(1)


class Filled(nn.Module):
    def forward(self, x):
        return x.masked_fill(HIDDEN, -math.inf).softmax(-1) + torch.where(HIDDEN, LOWEST, x).softmax(-1)


class Constant(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=self.mask) + (q @ q.mT + self.mask).softmax(-1) @ q


class Factor(nn.Module):
    def forward(self, x, visible):
        return (x + ((1.0 - visible) * LOWEST)[:, None].expand(-1, 4, -1)).softmax(-1)


class Made(nn.Module):
    def forward(self, x):
        return (x + torch.full((4, 4), -math.inf).triu(1)).softmax(-1)


def infinite():
    return torch.zeros(4, 4).masked_fill(HIDDEN, -math.inf)


def literals(program):
    return [v for n in program.graph.nodes for v in n.args if isinstance(v, float) and abs(v) > 65504]


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Filled(), (torch.randn(4, 4),)),
        (Factor(), (torch.randn(2, 4, 4), torch.tensor([[1.0, 1, 1, 0], [1, 0, 1, 1]]))),
        (Made(), (torch.randn(4, 4),)),
    ],
)
def test_fills_and_factors_become_finite(check_pass, module, inputs):
    result = check_pass(FiniteMasks(), module, *inputs)
    assert not literals(result.program)


@pytest.mark.parametrize("mask", [infinite(), infinite().clamp(min=LOWEST)])
def test_a_constant_mask_becomes_finite(check_pass, mask):
    result = check_pass(FiniteMasks(-3e4), Constant(mask), torch.randn(1, 4, 8))
    (held,) = result.program.state_dict.values()
    assert held.min() == -3e4


class HidesARow(nn.Module):
    def forward(self, x):
        hidden = HIDDEN.clone()
        hidden[2] = True
        return x.masked_fill(hidden, LOWEST).softmax(-1)


def test_a_filled_row_that_hides_everything_keeps_its_mean(check_pass):
    result = check_pass(FiniteMasks(), HidesARow(), torch.randn(4, 4))
    assert not literals(result.program)


def test_a_constant_that_hides_a_row_stays(check_pass):
    mask = infinite().clamp(min=LOWEST)
    mask[1] = LOWEST
    result = check_pass(FiniteMasks(), Constant(mask), torch.randn(1, 4, 8), modified=False)
    assert "hides everything" in result.declined[0].reason


class ReadElsewhere(nn.Module):
    def forward(self, x):
        masked = x.masked_fill(HIDDEN, LOWEST)
        return masked.softmax(-1) + masked.amax(-1, keepdim=True)


class FeedsOutput(nn.Module):
    def forward(self, x):
        return x.masked_fill(HIDDEN, LOWEST)


class Upwards(nn.Module):
    def forward(self, x):
        return x.masked_fill(HIDDEN, math.inf).softmax(-1)


@pytest.mark.parametrize(
    ("module", "reason"), [(ReadElsewhere(), "amax"), (FeedsOutput(), "output"), (Upwards(), "upwards")]
)
def test_what_is_no_mask_of_a_softmax_stays(check_pass, module, reason):
    result = check_pass(FiniteMasks(), module, torch.randn(4, 4), modified=False)
    assert reason in result.declined[0].reason
