"""Equal calls and equal weights become one; random, mutating and merely similar ones stay."""

import torch
from torch import nn

from edgegen.rewrite.merge_common import MergeCommon


class Wrap(nn.Module):
    def __init__(self, function, *weights):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(weights)

    def forward(self, *inputs):
        return self.function(*inputs, *self.weights)


def test_equal_calls_become_one_transitively(check_pass):
    def forward(x, y):
        a, b = nn.functional.silu(x), nn.functional.silu(x)
        first, second = (a + y).chunk(2, -1), (y + b).chunk(2, -1)
        return first[0] * second[0] + second[1]

    after = {"aten.silu": 1, "aten.chunk": 1, "aten.add": 2}
    check_pass(MergeCommon(), Wrap(forward), torch.randn(2, 4), torch.randn(2, 4), before={"aten.silu": 2}, after=after)


def test_a_merged_call_may_be_an_output(check_pass):
    check_pass(MergeCommon(), Wrap(lambda x: (x.exp(), x.exp())), torch.randn(3), after={"aten.exp": 1})


def test_weights_of_the_same_bytes_become_one(check_pass):
    weight = torch.randn(4, 4)
    module = Wrap(
        lambda x, a, b, c: (nn.functional.linear(x, a), nn.functional.linear(x, b), nn.functional.linear(x, c)),
        weight,
        weight.clone(),
        weight + 1e-7,
    )
    result = check_pass(MergeCommon(), module, torch.randn(2, 4), after={"aten.linear": 2})
    assert len(result.program.state_dict) == 2


def test_zeros_of_two_signs_and_two_shapes_are_not_the_same_bytes(check_pass):
    module = Wrap(lambda x, a, b, c: x + a + b + c.view(4), torch.zeros(4), -torch.zeros(4), torch.zeros(2, 2))
    check_pass(MergeCommon(), module, torch.randn(4), modified=False)


def test_arguments_that_only_look_alike_stay(check_pass):
    def forward(x, y):
        return (
            x - y,
            y - x,
            x.pow(2),
            x.pow(2.0),
            torch.add(x, y, alpha=2),
            torch.add(y, x, alpha=2),
            x.sum(0),
            x.sum(1),
        )

    check_pass(MergeCommon(), Wrap(forward), torch.randn(2, 2), torch.randn(2, 2), modified=False)


def test_random_calls_stay(check_pass):
    result = MergeCommon()(torch.export.export(Wrap(lambda x: x + torch.rand(3) * torch.rand(3)), (torch.randn(3),)))
    assert not result.modified and "random" in result.declined[0].reason


def test_a_graph_that_mutates_stays(check_pass):
    def forward(x):
        a = x.exp()
        a.add_(1)
        return a + x.exp()

    result = check_pass(MergeCommon(), Wrap(forward), torch.randn(3), modified=False)
    assert "mutates" in result.declined[0].reason
