"""Chains of views and transposes become the fewest that do the same; shared and minimal ones stay."""

import torch
from torch import nn

from edgegen.rewrite.base import census
from edgegen.rewrite.merge_rearrangements import MergeRearrangements


class Wrap(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def moves(program):
    names = ("view", "reshape", "flatten", "unsqueeze", "squeeze", "transpose", "permute", "clone", "contiguous")
    return {name: count for name, count in census(program).items() if name.removeprefix("aten.") in names}


def test_inverse_transposes_and_views_vanish(check_pass):
    def forward(x):
        y = x.transpose(1, 2).permute(0, 2, 1).unsqueeze(0).squeeze(0).relu()
        return y[:, :, None, None].flatten(1)

    result = check_pass(MergeRearrangements(), Wrap(forward), torch.randn(2, 3, 4))
    assert moves(result.program) == {"aten.reshape": 1}


def test_a_whole_chain_may_be_the_output_and_the_input(check_pass):
    check_pass(MergeRearrangements(), Wrap(lambda x: x.t().t().view(2, 3)), torch.randn(2, 3), after={"aten.t": 0})


def test_tokens_are_made_by_a_permute_of_the_image(check_pass):
    def forward(x):
        tokens = x.flatten(2).transpose(1, 2).softmax(-1)
        return tokens.transpose(1, 2).reshape(x.shape) + 1

    x = torch.randn(2, 8, 3, 4)
    check_pass(MergeRearrangements(), Wrap(forward), x, modified=False)
    after = {"aten.permute": 2, "aten.reshape": 2, "aten.transpose": 0, "aten.flatten": 0}
    check_pass(MergeRearrangements(images=True), Wrap(forward), x, after=after)


def test_a_value_that_others_read_is_not_computed_twice(check_pass):
    def forward(x):
        heads = x.view(2, 6, 2, 4).transpose(1, 2)
        return heads.relu(), heads.reshape(4, 6, 4).exp()

    check_pass(MergeRearrangements(), Wrap(forward), torch.randn(2, 6, 8), modified=False)


def test_what_others_read_is_passed_by_where_that_is_shorter(check_pass):
    def forward(x):
        turned = x.transpose(1, 2)
        return turned.relu(), turned.transpose(1, 2).exp()

    check_pass(MergeRearrangements(), Wrap(forward), torch.randn(2, 6, 8), after={"aten.transpose": 1})


def test_reshapes_without_common_factors_stay(check_pass):
    check_pass(
        MergeRearrangements(), Wrap(lambda x: x.view(3, 2).t().reshape(6) * 2), torch.randn(2, 3), modified=False
    )


def test_a_view_of_what_now_lies_otherwise_becomes_a_reshape(check_pass):
    def forward(x):
        return x.transpose(1, 2).contiguous().relu().view(2, 24)

    result = check_pass(MergeRearrangements(), Wrap(forward), torch.randn(2, 6, 4))
    assert moves(result.program) == {"aten.transpose": 1, "aten.reshape": 1}
