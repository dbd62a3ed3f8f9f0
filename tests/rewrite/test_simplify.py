"""Arithmetic that does nothing, and broadcasts in front of what broadcasts by itself."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.base import census
from edgegen.rewrite.remove_broadcasts import RemoveBroadcasts
from edgegen.rewrite.simplify_arithmetic import SimplifyArithmetic


class Wrap(nn.Module):
    def __init__(self, function, *weights):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(weights)

    def forward(self, *inputs):
        return self.function(*inputs, *self.weights)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 1,
        lambda x: 1.0 * x / 1.0,
        lambda x: 0 + x - 0.0,
        lambda x: torch.neg(-x),
        lambda x: x**1,
    ],
)
def test_what_does_nothing_goes_even_as_the_output(check_pass, function):
    result = check_pass(SimplifyArithmetic(), Wrap(lambda x: function(x.exp())), torch.randn(3))
    assert census(result.program) == {"aten.exp": 1}


def test_weights_of_ones_and_zeros_are_numbers(check_pass):
    module = Wrap(lambda x, one, zero: x * one + zero, torch.ones(3), torch.zeros(1, 3))
    result = check_pass(SimplifyArithmetic(), module, torch.randn(2, 3), after={"aten.mul": 0, "aten.add": 0})
    assert not result.program.state_dict


def test_numbers_in_a_row_become_one(check_pass):
    module = Wrap(lambda x: ((x * 0.5 * 3.0).exp() + 1.0 + 2.0).relu().relu())
    check_pass(SimplifyArithmetic(), module, torch.randn(3), after={"aten.mul": 1, "aten.add": 1, "aten.relu": 1})


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x + 2.0 - 0.1 + -1.9, None),
        (lambda x: x + 2.0 + -1.9, "cancel"),
        (lambda x: x * 1e-30 * 1e-20, "range"),
        (lambda x: (y := x * 2.0) * 3.0 + y, "reads the value"),
        (lambda x: (x * 10).to(torch.int32) * 1.0, "dtype"),
        (lambda x: torch.div(x, 1, rounding_mode="floor"), None),
        (lambda x: 2 / x, None),
        (lambda x: 0 - x, None),
    ],
)
def test_what_does_something_stays(check_pass, function, why):
    result = check_pass(SimplifyArithmetic(), Wrap(function), torch.rand(3) + 1, modified=False)
    assert why is None or any(why in one.reason for one in result.declined)


def test_a_weight_that_broadcasts_is_no_identity(check_pass):
    module = Wrap(lambda x, one: x * one, torch.ones(4, 3))
    result = check_pass(SimplifyArithmetic(), module, torch.randn(3), modified=False)
    assert "shape" in result.declined[0].reason


def test_what_broadcasts_reads_the_small_value(check_pass):
    def forward(x, mask, weight):
        y = x + weight.expand(2, 3, 4) * x + weight[None].repeat(2, 3, 1)
        y = torch.where(mask.expand(2, 3, 4), y, x)
        scores = y @ weight.expand(2, 1, 4).transpose(1, 2) + y @ x[:1].expand(2, 3, 4).transpose(1, 2)
        return scores

    module, x, mask = Wrap(forward, torch.randn(1, 4)), torch.randn(2, 3, 4), torch.rand(2, 3, 1) > 0.5
    result = check_pass(RemoveBroadcasts(), module, x, mask, before={"aten.repeat": 1, "aten.expand": 4})
    assert census(result.program)["aten.repeat"] == 0
    assert census(result.program)["aten.expand"] == 2  # transposed before a product: not in front of it


def test_products_broadcast_their_batch(check_pass):
    module = Wrap(lambda x, w: x @ w.expand(2, 4, 5), torch.randn(1, 4, 5))
    check_pass(RemoveBroadcasts(), module, torch.randn(2, 3, 4), after={"aten.expand": 0})


def test_attention_broadcasts_its_mask_alone(check_pass):
    def forward(x, mask):
        mask = mask.expand(2, 2, 3, 3)
        return nn.functional.scaled_dot_product_attention(x, x[:1].expand(2, 2, 3, 4), x, attn_mask=mask)

    x, mask = torch.randn(2, 2, 3, 4), torch.randn(1, 1, 3, 3)
    result = check_pass(RemoveBroadcasts(), Wrap(forward), x, mask, after={"aten.expand": 1})
    assert "queries" in result.declined[0].reason


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: torch.cat([x.expand(2, 3), x.expand(2, 3)]), "does not broadcast"),
        (lambda x: x.expand(2, 3) * 2, "would give less"),
        (lambda x: x.repeat(1, 2) + torch.ones(6), "tiles"),
        (lambda x: torch.ones(4, 5) @ x[:, :1].expand(5, 3), "along the expanded axis"),
    ],
)
def test_other_readers_need_the_large_value(check_pass, function, why):
    result = check_pass(RemoveBroadcasts(), Wrap(function), torch.randn(1, 3), modified=False)
    assert why is None or any(why in one.reason for one in result.declined), result.declined
