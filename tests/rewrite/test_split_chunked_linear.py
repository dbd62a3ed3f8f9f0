"""A product whose output is only cut along its features becomes one a part."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.split_chunked_linear import SplitChunkedLinear


class Geglu(nn.Module):
    def __init__(self, bias=True, how="chunk"):
        super().__init__()
        self.project, self.how = nn.Linear(6, 8, bias=bias), how

    def forward(self, x):
        h = self.project(x)
        if self.how == "chunk":
            value, gate = h.chunk(2, dim=-1)
        elif self.how == "split":
            value, gate = h.split(4, dim=2)
        elif self.how == "sizes":
            value, gate = h.split([4, 4], dim=-1)
        else:
            value, gate = h[..., :4], h[..., 4:]
        return value * nn.functional.gelu(gate)


@pytest.mark.parametrize("how", ["chunk", "split", "sizes", "slice"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_feed_forward_becomes_two_linears(check_pass, how, bias):
    gone = dict.fromkeys(("aten.chunk", "aten.split", "aten.split_with_sizes", "aten.slice"), 0)
    check_pass(SplitChunkedLinear(), Geglu(bias, how), torch.randn(1, 5, 6), after={**gone, "aten.linear": 2})


class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1, stride=2)

    def forward(self, x):
        a, b, _ = self.conv(x).split([1, 4, 2], dim=1)
        return a, b


def test_parts_of_a_convolution_may_be_outputs_and_unread_ones_go(check_pass):
    result = check_pass(SplitChunkedLinear(), Uneven(), torch.randn(2, 3, 6, 6), after={"aten.conv2d": 2})
    assert sorted(len(value) for value in result.program.state_dict.values()) == [1, 1, 4, 4]


class Fused(nn.Module):
    """Queries, keys and values of one projection, as vision transformers view them."""

    def __init__(self, permuted):
        super().__init__()
        self.qkv, self.permuted = nn.Linear(8, 24), permuted

    def forward(self, x):
        h = self.qkv(x).reshape(2, 5, 3, 4, 2)
        q, k, v = h.permute(2, 0, 3, 1, 4).unbind(0) if self.permuted else h.unbind(2)
        return q * k + v.exp()


@pytest.mark.parametrize("permuted", [True, False])
def test_a_fused_projection_becomes_three(check_pass, permuted):
    check_pass(SplitChunkedLinear(), Fused(permuted), torch.randn(2, 5, 8), after={"aten.linear": 3, "aten.unbind": 0})


class Declined(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.linear = nn.Linear(6, 8)
        self.grouped = nn.Conv1d(6, 8, 1, groups=2)
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        if self.how == "axis":
            return torch.cat(self.linear(x).chunk(2, dim=1))
        if self.how == "output":
            h = self.linear(x)
            return h, h.chunk(2, dim=-1)[0]
        if self.how == "overlap":
            h = self.linear(x)
            return h[..., :5] * h[..., 3:]
        if self.how == "steps":
            return self.linear(x)[..., ::2]
        if self.how == "computed":
            a, b = nn.functional.linear(x, self.weight * x[0, 0]).chunk(2, dim=-1)
            return a + b
        if self.how == "tied":
            a, b = self.linear(x).chunk(2, dim=-1)
            return (a + b) @ self.linear.weight[:4]
        if self.how == "interleaved":
            a, b = self.linear(x).view(1, 6, 4, 2).unbind(3)
            return a + b
        a, b = self.grouped(x).chunk(2, dim=1)
        return a + b


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("axis", "cuts axis 1"),
        ("output", "reads its whole output"),
        ("overlap", "overlap"),
        ("steps", "not a run"),
        ("computed", "computed"),
        ("tied", "another call"),
        ("interleaved", "not runs of features"),
        ("grouped", "grouped"),
    ],
)
def test_declines(check_pass, how, reason):
    result = check_pass(SplitChunkedLinear(), Declined(how), torch.randn(1, 6, 6), modified=False)
    assert reason in result.declined[0].reason
