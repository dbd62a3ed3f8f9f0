"""Linear attention in the ways in which networks write it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen.rewrite.base import census
from edgegen.rewrite.mobile_linear_attention import MobileLinearAttention

MOBILE = {"aten.div": 1, "aten.mul": 0, "aten.pad": 0, "aten.slice": 0, "aten.cat": 0, "aten.matmul": 3}


def ones_below(v):
    return F.pad(v, (0, 0, 0, 1), value=1.0)


def channels_first(q, k, v, order="keys", pad=ones_below, eps=1e-8):
    """q, k, v [B, H, D, N], as SANA and MobileI2V have them."""
    q, k, v = q.relu(), k.relu().transpose(-1, -2), pad(v)
    out = v @ k @ q if order == "keys" else v @ (k @ q)
    return out[:, :, :-1] / (out[:, :, -1:] + eps)


def tokens_first(q, k, v, order="keys", eps=1e-6):
    q, k, v = q.relu().transpose(2, 3), k.relu(), F.pad(v.transpose(2, 3), (0, 1), value=1.0)
    out = q @ (k @ v) if order == "keys" else (q @ k) @ v
    return (out[..., :-1] / (out[..., -1:] + eps)).transpose(2, 3)


def with_sum(q, k, v, how="product"):
    q, k, v = q.relu().transpose(2, 3), k.relu().transpose(2, 3), v.transpose(2, 3)
    kv = k.transpose(2, 3) @ v
    if how == "product":
        total = q @ k.sum(dim=2, keepdim=True).transpose(2, 3)
    elif how == "elementwise":
        total = (q * k.sum(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True)
    else:
        total = q @ k.transpose(2, 3).sum(dim=-1, keepdim=True)
    return (q @ kv / (total + 1e-6)).transpose(2, 3)


def channels_with_sum(q, k, v):
    q, k = q.relu(), k.relu()
    return v @ k.transpose(2, 3) @ q / (k.sum(-1, keepdim=True).transpose(2, 3) @ q + 1e-6)


def concatenated(v):
    return torch.cat([v, torch.ones_like(v[:, :, :1])], 2)


FORMS = {
    "MobileI2V": channels_first,
    "scores first": lambda q, k, v: channels_first(q, k, v, "scores"),
    "concatenated ones": lambda q, k, v: channels_first(q, k, v, pad=concatenated),
    "tokens first": tokens_first,
    "tokens and scores first": lambda q, k, v: tokens_first(q, k, v, "scores"),
    "sum by product": with_sum,
    "sum elementwise": lambda q, k, v: with_sum(q, k, v, "elementwise"),
    "sum of the transposed": lambda q, k, v: with_sum(q, k, v, "transposed"),
    "channels first, own sum": channels_with_sum,
}


class Run(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, q, k, v):
        return self.form(q, k, v)


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return tuple(torch.randn(2, 3, 4, 20) for _ in range(3))


@pytest.mark.parametrize("name", FORMS)
def test_all_ways_of_writing_it(check_pass, qkv, name):
    result = check_pass(MobileLinearAttention(), Run(FORMS[name]), *qkv, before={"aten.div": 1}, after=MOBILE)
    # Besides the products: the keys' sum, the shift and the division; and no copies but of the keys.
    ops = census(result.program)
    assert ops["aten.transpose"] + ops["aten.permute"] <= 3


class Block(nn.Module):
    """Behind projections, and its output in tokens."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (part.transpose(1, 2).reshape(b, 2, 4, n) for part in self.qkv(x).chunk(3, -1))
        return self.out(channels_first(q, k, v).reshape(b, c, n).permute(0, 2, 1))


def test_in_a_block(check_pass):
    check_pass(MobileLinearAttention(), Block(), torch.randn(1, 20, 8), after=MOBILE)


def other_queries(q, k, v):
    out = ones_below(v) @ k.transpose(2, 3) @ q
    return out[:, :, :-1] / ((out + 1)[:, :, -1:] + 1e-6)


def other_rows(q, k, v):
    out = F.pad(v, (0, 0, 0, 1), value=2.0) @ k.transpose(2, 3) @ q.abs()
    return out[:, :, :-1] / (out[:, :, -1:] + 1e-6)


def other_sums(q, k, v):
    q, k = q.abs(), k.abs()
    return v @ k.transpose(2, 3) @ q / (v.abs().sum(-1, keepdim=True).transpose(2, 3) @ q + 1e-6)


def in_double(q, k, v):
    out = (ones_below(v) @ k.abs().transpose(2, 3) @ q.abs()).double()
    return out[:, :, :-1] / (out[:, :, -1:] + 1e-6)


def plain_division(q, k, v):
    return q / (k.abs() + 1e-6)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (other_queries, None),
        (other_rows, "row of ones"),
        (other_sums, "same queries and keys"),
        (in_double, "another precision"),
        (plain_division, None),
    ],
)
def test_declines(check_pass, qkv, form, reason):
    result = check_pass(MobileLinearAttention(), Run(form), *qkv, modified=False)
    assert len(result.declined) == (reason is not None)
    assert reason is None or reason in result.declined[0].reason


def test_declines_by_shape(check_pass):
    few = tuple(torch.rand(1, 2, 16, 3) for _ in range(3))
    result = check_pass(MobileLinearAttention(), Run(FORMS["scores first"]), *few, modified=False)
    assert "as scores" in result.declined[0].reason


@pytest.mark.parametrize("total", ["sum", "product"])
def test_three_axes_are_multiplied_by_bmm(check_pass, qkv, total):
    def form(q, k, v):
        out = torch.bmm(torch.bmm(F.pad(v, (0, 0, 0, 1), value=1.0), k.relu().transpose(1, 2)), q.relu())
        return out[:, :-1] / (out[:, -1:] + 1e-8)

    product = total == "product"
    after = {"aten.matmul": 0, "aten.bmm": 3 + product, "aten.sum": 1 - product, "aten.pad": 0}
    one = MobileLinearAttention(total=total)
    check_pass(one, Run(form), *(part[0] for part in qkv), before={"aten.bmm": 2}, after=after)


def test_sum_by_product_of_four_axes(check_pass, qkv):
    check_pass(
        MobileLinearAttention(total="product"), Run(channels_first), *qkv, after={"aten.matmul": 4, "aten.sum": 0}
    )
