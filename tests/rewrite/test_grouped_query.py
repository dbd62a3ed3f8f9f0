"""Keys and values that several heads share are not repeated."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen.rewrite.grouped_query import GroupedQuery

ATTENTION = "aten.scaled_dot_product_attention"
REPEATS = {"aten.repeat_interleave": 0, "aten.expand": 0, "aten.repeat": 0}


class Repeats(nn.Module):
    def __init__(self, how, mask=None, causal=False):
        super().__init__()
        self.how, self.causal = how, causal
        self.register_buffer("mask", mask)

    def repeat(self, x, heads):
        b, shared, length, width = x.shape
        if self.how == "interleave":
            return x.repeat_interleave(heads // shared, 1)
        if self.how == "expanded axis":
            return x[:, :, None].expand(b, shared, heads // shared, length, width).reshape(b, heads, length, width)
        if self.how == "expand":
            return x.expand(b, heads, length, width)
        return x.repeat(1, heads // shared, 1, 1)

    def forward(self, q, k, v):
        k, v = self.repeat(k, q.shape[1]), self.repeat(v, q.shape[1])
        return F.scaled_dot_product_attention(q, k, v, self.mask, 0.0, self.causal)


class Flagged(nn.Module):
    def forward(self, q, k, v, bias=None):
        return F.scaled_dot_product_attention(q, k, v, bias, scale=0.4, enable_gqa=True)


def heads(shared):
    torch.manual_seed(0)
    return torch.randn(2, 4, 5, 3), torch.randn(2, shared, 6, 3), torch.randn(2, shared, 6, 7)


CASES = [("interleave", 2), ("interleave", 1), ("expanded axis", 2), ("expanded axis", 1), ("expand", 1), ("repeat", 1)]


@pytest.mark.parametrize("form", ["fold", "flag"])
@pytest.mark.parametrize(("how", "shared"), CASES)
def test_repeats_are_seen_through(check_pass, form, how, shared):
    gone = {**REPEATS, ATTENTION: 1}
    check_pass(GroupedQuery(form), Repeats(how), *heads(shared), before={ATTENTION: 1}, after=gone)


def test_flagged_attention_is_folded(check_pass):
    result = check_pass(GroupedQuery(), Flagged(), *heads(2), after={"aten.reshape": 2})
    (node,) = [node for node in result.program.graph.nodes if "attention" in node.name]
    assert tuple(node.meta["val"].shape) == (2, 2, 10, 7)
    check_pass(GroupedQuery("flag"), Flagged(), *heads(2), modified=False)


@pytest.mark.parametrize(("shared", "groups", "joined"), [(1, 2, 2), (2, 2, 0)])
def test_one_key_head_is_repeated_to_the_least_that_is_asked_for(check_pass, shared, groups, joined):
    after = {**REPEATS, ATTENTION: 1, "aten.cat": joined}
    result = check_pass(GroupedQuery(least=2), Repeats("interleave"), *heads(shared), after=after)
    (node,) = [node for node in result.program.graph.nodes if "attention" in node.name]
    assert tuple(node.meta["val"].shape) == (2, groups, 4 // groups * 5, 7)


@pytest.mark.parametrize("shape", [(5, 6), (1, 1, 1, 6), (2, 4, 5, 6), (1, 6)])
def test_masks_follow_the_fold(check_pass, shape):
    check_pass(GroupedQuery(), Repeats("interleave", torch.randn(shape)), *heads(2))


def test_causal_attention_gets_a_mask(check_pass):
    q, k, v = heads(2)
    check_pass(GroupedQuery(), Repeats("interleave", causal=True), q, k[:, :, :5], v[:, :, :5])


def test_declines(check_pass):
    q, k, v = heads(2)
    tiled = check_pass(GroupedQuery(), Repeats("repeat"), q, k, v, modified=False)
    assert "head by head" in tiled.declined[0].reason
    computed = check_pass(GroupedQuery(), Flagged(), q, k, v, torch.randn(5, 6), modified=False)
    assert "computes its mask" in computed.declined[0].reason
    by_head = check_pass(GroupedQuery(), Flagged(), q, k, v, torch.randn(1, 4, 1, 6), modified=False)
    assert "differs between heads" in by_head.declined[0].reason


class Plain(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def test_heads_with_keys_of_their_own_stay(check_pass):
    assert not check_pass(GroupedQuery(), Plain(), *heads(4), modified=False).declined
