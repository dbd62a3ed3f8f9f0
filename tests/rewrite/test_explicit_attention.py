"""Attention as two matrix products around a softmax; masks, scales, grouped queries."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.base import census
from edgegen.rewrite.explicit_attention import ExplicitAttention
from edgegen.students.networks.clip_text import ClipTextConfig, ClipTextEncoder
from edgegen.students.networks.unet import Attention

attend = nn.functional.scaled_dot_product_attention
BOTH = pytest.mark.parametrize("rank", [3, 4])
GONE = {"aten.scaled_dot_product_attention": 0}


@pytest.mark.parametrize("batch", [1, 2])
@BOTH
def test_of_a_unet_has_its_scale_in_the_projection(check_pass, rank, batch):
    module = Attention(16, 12, 4)
    product = "aten.bmm" if rank == 3 else "aten.matmul"
    after = {**GONE, product: 2, "aten.softmax": 1, "aten.mul": 0}
    result = check_pass(
        ExplicitAttention(rank), module, torch.randn(batch, 6, 16), torch.randn(batch, 5, 12), after=after
    )
    found = census(result.program)
    if batch == 1:
        assert sum(found[f"aten.{op}"] for op in ("view", "reshape", "transpose", "permute", "flatten")) == 8
    for node in result.program.graph.nodes:
        assert node.op != "call_function" or node.meta["val"].dim() <= max(rank, 3) or batch > 1


def test_of_a_text_encoder_adds_the_mask_that_is_there(check_pass):
    config = ClipTextConfig(
        vocab_size=9,
        max_position_embeddings=6,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=16,
    )
    after = {**GONE, "aten.bmm": 4, "aten.mul": 0}
    result = check_pass(ExplicitAttention(), ClipTextEncoder(config), torch.randint(0, 9, (1, 6)), after=after)
    assert not any("additive" in name for name in result.program.state_dict)


class Plain(nn.Module):
    """Attention straight over inputs, its result the output."""

    def __init__(self, mask=None, **options):
        super().__init__()
        self.options = options
        if isinstance(mask, torch.Tensor):
            self.register_buffer("mask", mask)
        else:
            self.mask = None

    def forward(self, q, k, v, mask=None):
        return attend(q, k, v, self.mask if mask is None else mask, **self.options)


def inputs(*lead, rows=5, columns=7, heads=None):
    kv = lead if heads is None else (*lead[:-1], heads)
    return torch.randn(*lead, rows, 4), torch.randn(*kv, columns, 4), torch.randn(*kv, columns, 6)


@pytest.mark.parametrize("lead", [(3,), (1, 3), (2, 3), (2, 1), (2, 2, 3)])
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@BOTH
def test_of_inputs(check_pass, lead, scale, rank):
    if rank == 4 and len(lead) == 1:
        pytest.skip("rank 3 has no heads of its own")
    after = {**GONE, "aten.mul": int(scale != 1.0)}
    check_pass(ExplicitAttention(rank), Plain(scale=scale), *inputs(*lead), after=after)


def keep(*shape):
    """A boolean mask that leaves every query the first key at least."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0] = True
    return mask


MASKS = [(5, 7), (1, 7), (1, 1, 5, 7), (1, 3, 5, 7), (2, 1, 1, 7), (2, 3, 5, 7)]


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize(("kind", "held"), [("bool", True), ("infinite", True), ("bool", False), ("finite", False)])
def test_masks(check_pass, kind, shape, held):
    mask = keep(*shape)
    if kind != "bool":
        hidden = -torch.inf if kind == "infinite" else -3.0
        mask = torch.zeros(shape).masked_fill(~mask, hidden)
    given = inputs(shape[0] if len(shape) == 4 else 1, 3)
    module = Plain(mask if held else None)
    after = {**GONE, "aten.bmm": 2, **({"aten.to": 0, "aten.sub": 0} if held else {})}
    result = check_pass(ExplicitAttention(), module, *given, *([] if held else [mask]), after=after)
    if held:
        assert all(torch.isfinite(value).all() for value in result.program.state_dict.values())


@pytest.mark.parametrize("shape", MASKS)
def test_masks_of_rank_four(check_pass, shape):
    check_pass(ExplicitAttention(4), Plain(keep(*shape)), *inputs(shape[0] if len(shape) == 4 else 1, 3), after=GONE)


@pytest.mark.parametrize("rows", [5, 7, 1])
@BOTH
def test_causal(check_pass, rows, rank):
    check_pass(ExplicitAttention(rank), Plain(is_causal=True), *inputs(2, 3, rows=rows), after=GONE)


@pytest.mark.parametrize("mask", [None, (5, 7), (1, 7)])
@pytest.mark.parametrize("causal", [True, False])
@BOTH
def test_grouped_queries_are_rows_of_their_key(check_pass, mask, causal, rank):
    if mask and causal:
        return
    module = Plain(keep(*mask) if mask else None, is_causal=causal, enable_gqa=True)
    after = {**GONE, "aten.repeat_interleave": 0, "aten.expand": 0}
    check_pass(ExplicitAttention(rank), module, *inputs(2, 6, heads=2), after=after)


class Projected(nn.Module):
    """One head; `how` says what stands between a projection and the attention."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.how == "read twice":
            return attend(q[:, None], k[:, None], v[:, None]), q
        if self.how == "key":
            return attend(torch.tanh(q)[:, None], k[:, None], v[:, None])
        if self.how == "neither":
            return attend(torch.tanh(q)[:, None], torch.tanh(k)[:, None], v[:, None])
        if self.how == "tied":
            return attend(q[:, None], k.tanh()[:, None], self.q(v)[:, None])
        if self.how == "same":
            return attend(q[:, None], q[:, None], q[:, None])
        return attend(q[:, None], k[:, None], k[:, None])


@pytest.mark.parametrize(
    ("how", "mul"), [("read twice", 0), ("key", 0), ("neither", 1), ("tied", 1), ("same", 1), ("key is value", 0)]
)
def test_the_scale_goes_where_it_is_read_alone(check_pass, how, mul):
    result = check_pass(ExplicitAttention(), Projected(how), torch.randn(2, 5, 4), after={**GONE, "aten.mul": mul})
    names = " ".join(result.program.state_dict)
    assert ("k.weight_scaled" in names) == (how in ("key", "read twice"))


def hides_all():
    mask = keep(5, 7)
    mask[2] = False
    return mask


@pytest.mark.parametrize(
    ("module", "given", "reason"),
    [
        (Plain(dropout_p=0.1), inputs(1, 3), "drops out"),
        (Plain(hides_all()), inputs(1, 3), "hides every key"),
        (Plain(), (torch.randn(5, 4), torch.randn(7, 4), torch.randn(7, 4)), "axes"),
        (Plain(), (*inputs(2, 3)[:1], *inputs(1, 3)[1:]), "broadcast"),
        (Plain(enable_gqa=True), (*inputs(2, 6, heads=2), torch.randn(5, 7)), "grouped"),
        (Plain(keep(1, 6, 5, 7), enable_gqa=True), inputs(2, 6, heads=2), "grouped"),
    ],
)
def test_declines(check_pass, module, given, reason):
    result = check_pass(ExplicitAttention(), module, *given, modified=False)
    assert reason in result.declined[0].reason
