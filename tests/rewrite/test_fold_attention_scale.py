"""The scale of an attention in the weights of its queries."""

import torch
from torch import nn

from edgegen.graph.attention import ATTENTION, read_attention
from edgegen.graph.edit import weights
from edgegen.rewrite.base import census
from edgegen.rewrite.explicit_attention import ExplicitAttention
from edgegen.rewrite.fold_attention_scale import FoldAttentionScale
from edgegen.students.networks.unet import Attention

attend = nn.functional.scaled_dot_product_attention
KEPT = {"aten.scaled_dot_product_attention": 1, "aten.mul": 0}


def scales(program):
    return [read_attention(node).scale for node in program.graph.nodes if node.target is ATTENTION]


def test_of_a_unet_is_in_the_projection(check_pass):
    result = check_pass(
        FoldAttentionScale(), Attention(16, 12, 4), torch.randn(1, 6, 16), torch.randn(1, 5, 12), after=KEPT
    )
    assert scales(result.program) == [1.0] and not result.declined


def test_what_is_written_out_afterwards_is_what_would_have_been(check_pass):
    module, given = Attention(16, 12, 4), (torch.randn(1, 6, 16), torch.randn(1, 5, 12))
    first = check_pass(FoldAttentionScale(), module, *given).program
    after, alone = (check_pass(ExplicitAttention(), one, *given).program for one in (first, module))
    assert census(after) == census(alone)


class Heads(nn.Module):
    """Queries that are keys too, or are computed on the way: what may not be scaled in place."""

    def __init__(self, how, **options):
        super().__init__()
        self.how, self.options = how, options
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=name != "q") for name in "qkv")

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.how == "normed":
            q = nn.functional.normalize(q, dim=-1)
        if self.how == "neither":
            q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        if self.how == "shared":
            k = q
        heads = (one.view(1, -1, 2, 4).transpose(1, 2) for one in (q, k, v))
        return attend(*heads, **self.options)


def test_the_mask_and_the_scale_that_were_said_count(check_pass):
    given = torch.randn(1, 5, 8)
    result = check_pass(FoldAttentionScale(), Heads("plain", is_causal=True, scale=0.3), given, after=KEPT)
    assert scales(result.program) == [1.0]
    assert not check_pass(FoldAttentionScale(), Heads("plain", scale=1.0), given, modified=False).declined


def test_keys_take_what_queries_cannot(check_pass):
    module = Heads("normed")
    program = check_pass(FoldAttentionScale(), module, torch.randn(1, 5, 8), after=KEPT).program
    held = weights(program).values()
    assert any(torch.equal(one, module.k.weight * 0.5) for one in held)
    assert any(torch.equal(one, module.q.weight) for one in held)


def test_declines_where_nothing_can_take_it(check_pass):
    for how in ("neither", "shared"):
        (declined,) = check_pass(FoldAttentionScale(), Heads(how), torch.randn(1, 5, 8), modified=False).declined
        assert declined.op == "aten.scaled_dot_product_attention" and "neither" in declined.reason
