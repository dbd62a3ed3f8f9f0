"""Attention and the tokens around it with channels first: one head at a time, or all at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen.rewrite.base import census
from edgegen.rewrite.channels_first_attention import ChannelsFirstAttention
from edgegen.students.networks.unet import Attention

FORMS = ("split", "whole")


class CrossAttention(nn.Module):
    def __init__(self, heads=2):
        super().__init__()
        self.attention = Attention(8, 6, heads)

    def forward(self, x, context):
        return self.attention(x, context)


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randn(2, 5, 8), torch.randn(2, 3, 6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_cross_attention(check_pass, tokens, form, heads):
    products = {"split": {"aten.einsum": 2 * heads}, "whole": {"aten.matmul": 2}}[form]
    softmax = heads if form == "split" else 1
    result = check_pass(
        ChannelsFirstAttention(form),
        CrossAttention(heads),
        *tokens,
        before={"aten.scaled_dot_product_attention": 1},
        after={"aten.scaled_dot_product_attention": 0, "aten.softmax": softmax, "aten.mul": 0, **products},
    )
    assert all(node.meta["val"].dim() <= 4 for node in result.program.graph.nodes if node.name.startswith("softmax"))


class Masked(nn.Module):
    """x: [B, H, L, E]; the output is the attention itself."""

    def __init__(self, mask=None, causal=False, scale=None):
        super().__init__()
        self.register_buffer("mask", mask)
        self.causal, self.scale = causal, scale

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, self.mask, 0.0, self.causal, scale=self.scale)


def heads_of(queries=4, keys=4, heads=2):
    torch.manual_seed(1)
    return torch.randn(1, heads, queries, 3), torch.randn(1, heads, keys, 3), torch.randn(1, heads, keys, 5)


MASKS = {
    "additive": torch.randn(4, 4),
    "one row": torch.randn(1, 1, 1, 4),
    "by head": torch.randn(1, 2, 4, 4),
    "infinite": torch.triu(torch.full((4, 4), -torch.inf), 1),
    "boolean": torch.ones(4, 4, dtype=torch.bool).tril(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MASKS)
def test_masks_held_by_the_graph(check_pass, form, name):
    result = check_pass(ChannelsFirstAttention(form), Masked(MASKS[name]), *heads_of())
    assert all(value.isfinite().all() for value in result.program.state_dict.values())


@pytest.mark.parametrize("form", FORMS)
def test_causal_and_a_scale_of_its_own(check_pass, form):
    check_pass(ChannelsFirstAttention(form), Masked(causal=True, scale=0.3), *heads_of(), after={"aten.mul": 1})


class ComputedMask(nn.Module):
    def forward(self, q, k, v, bias):
        return F.scaled_dot_product_attention(q, k, v, bias.tanh())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 1, 4), (1, 2, 4, 4)])
def test_masks_that_the_graph_computes(check_pass, form, shape):
    check_pass(ChannelsFirstAttention(form), ComputedMask(), *heads_of(), torch.randn(shape))


class Grouped(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_grouped_queries_share_their_keys(check_pass):
    q, _, _ = heads_of(heads=4)
    _, k, v = heads_of()
    after = {"aten.einsum": 8, "aten.repeat_interleave": 0, "aten.expand": 0}
    check_pass(ChannelsFirstAttention(), Grouped(), q, k, v, after=after)
    result = check_pass(ChannelsFirstAttention("whole"), Grouped(), q, k, v, modified=False)
    assert "split" in result.declined[0].reason


@pytest.mark.parametrize("form", FORMS)
def test_scores_that_do_not_fit_are_made_in_parts(check_pass, form):
    mask = torch.randn(4, 4)
    rows = 2 if form == "whole" else 1
    one = ChannelsFirstAttention(form, max_score_bytes=rows * 4 * 4 * 2)  # half of the queries
    parts = {"aten.softmax": 2 if form == "whole" else 4}
    check_pass(one, Masked(mask), *heads_of(), after=parts)


class Repeated(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def test_keys_that_are_repeated_for_groups_are_not(check_pass):
    q, _, _ = heads_of(heads=4)
    _, k, v = heads_of()
    check_pass(ChannelsFirstAttention(), Repeated(), q, k, v, after={"aten.einsum": 8, "aten.repeat_interleave": 0})
    check_pass(ChannelsFirstAttention("whole"), Repeated(), q, k, v, after={"aten.repeat_interleave": 2})


class Shared(nn.Module):
    """Queries that something else reads: their weights must not be scaled."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        q = self.linear(x).view(1, 4, 2, 3).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q), q


@pytest.mark.parametrize("form", FORMS)
def test_queries_that_others_read_are_scaled_beside_them(check_pass, form):
    check_pass(ChannelsFirstAttention(form), Shared(), torch.randn(1, 4, 6), after={"aten.mul": 1})


class Drops(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5) * 0


class BooleanMask(nn.Module):
    def forward(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask > 0)


def test_declines(check_pass):
    one = ChannelsFirstAttention()
    q, k, v = heads_of()
    assert "drops out" in check_pass(one, Drops(), q, k, v, modified=False).declined[0].reason
    assert "3 axes" in check_pass(one, Masked(), q[0], k[0], v[0], modified=False).declined[0].reason
    assert "broadcast" in check_pass(one, Masked(), q, k[:, :1], v[:, :1], modified=False).declined[0].reason
    hidden = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    assert "every key" in check_pass(one, Masked(hidden), q, k, v, modified=False).declined[0].reason
    computed = check_pass(one, BooleanMask(), q, k, v, torch.ones(4, 4), modified=False)
    assert "boolean" in computed.declined[0].reason


def test_views_and_permutes_of_heads_are_merged(check_pass, tokens):
    result = check_pass(ChannelsFirstAttention("whole"), CrossAttention(), *tokens)
    ops = census(result.program)
    assert ops["aten.view"] == ops["aten.flatten"] == 0
    assert ops["aten.transpose"] + ops["aten.permute"] <= 5
