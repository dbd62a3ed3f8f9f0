"""A pruned network gives the numbers of the whole one in which what was cut is read as zero and norms see what is left.

Each network here has one thing that ties channels together in its own way; families follow in small.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgegen.errors import EdgegenError
from edgegen.graph.capture import capture
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.prune.check import check
from edgegen.prune.find import find
from edgegen.prune.space import to_pruning
from edgegen.students.architectures import build_module
from edgegen.students.families.registry import new
from edgegen.students.reduce import reduce
from edgegen.students.student import Component
from tests.prune.masked import Masked, chosen

TOLERANCE = 2e-5
"""Of the largest output: float32 sums in another order."""


class Residual(nn.Module):
    """Two producers of one stream, a norm of four groups, a consumer."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.inner, self.back, self.leave = nn.Conv2d(16, 24, 3), nn.Conv2d(24, 16, 3, padding=2), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.back(F.silu(self.inner(self.norm(x)))))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.each = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 3, groups=12)
        self.leave = nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.each(self.enter(x))))


class Grouped(nn.Module):
    """Four groups, each of three inputs and two outputs: a group goes whole."""

    def __init__(self):
        super().__init__()
        self.enter, self.groups = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 3, groups=4)
        self.leave = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.groups(self.enter(x))))


class Transposed(nn.Module):
    """A whole and a grouped transposed convolution."""

    def __init__(self):
        super().__init__()
        self.enter, self.up = nn.Conv2d(3, 10, 1), nn.ConvTranspose2d(10, 8, 2, stride=2)
        self.groups, self.leave = nn.ConvTranspose2d(8, 12, 2, groups=4), nn.ConvTranspose2d(12, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.groups(torch.relu(self.up(self.enter(x))))))


class Concatenated(nn.Module):
    """A skip beside what comes back, and a norm over both whose groups lie across the seam."""

    def __init__(self):
        super().__init__()
        self.enter, self.down = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 20, 1)
        self.norm, self.leave = nn.GroupNorm(8, 32), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        return self.leave(F.silu(self.norm(torch.cat([self.down(torch.relu(skip)), skip], dim=1))))


class Shared(nn.Module):
    """One layer called twice, and another that has its weight."""

    def __init__(self):
        super().__init__()
        self.enter, self.twice, self.tied = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied.weight = self.twice.weight
        self.leave = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        return self.leave(x + self.tied(torch.tanh(self.twice(torch.relu(self.twice(x))))))


class Attention(nn.Module):
    """`kv_heads` 1: multi-query; fewer than heads: grouped; RMSNorm of queries over each head or over all of them."""

    def __init__(self, kv_heads: int, wide_norm: bool = False, gqa: bool = False):
        super().__init__()
        self.width, self.gqa = 4, gqa
        self.to_q, self.to_out = nn.Linear(24, 24), nn.Linear(24, 24)
        self.to_k, self.to_v = nn.Linear(24, 4 * kv_heads), nn.Linear(24, 4 * kv_heads)
        self.norm = nn.RMSNorm(24) if wide_norm else nn.RMSNorm(4)
        self.wide = wide_norm

    def forward(self, x: Tensor) -> Tensor:
        def split(h: Tensor) -> Tensor:
            return h.view(*h.shape[:2], h.shape[2] // self.width, self.width).transpose(1, 2)

        q = self.to_q(x)
        q = split(self.norm(q)) if self.wide else self.norm(split(q))
        k, v = split(self.to_k(x)), split(self.to_v(x))
        if k.shape[1] == 1:
            k, v = (one.expand(-1, q.shape[1], -1, -1) for one in (k, v))
        elif not self.gqa:
            k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for one in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.gqa)
        return x + self.to_out(out.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """Gated feed-forwards, of linears and of convolutions, behind a norm without weights."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Linear(6, 10), nn.LayerNorm(10, elementwise_affine=False)
        self.proj, self.back = nn.Linear(10, 2 * 14), nn.Linear(14, 10)
        self.wide, self.each = nn.Conv2d(10, 2 * 9, 1), nn.Conv2d(18, 18, 3, padding=1, groups=18)
        self.point, self.leave = nn.Conv2d(9, 10, 1), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        value, gate = self.proj(self.norm(x)).chunk(2, dim=-1)
        x = x + self.back(value * F.gelu(gate))
        both = self.each(self.wide(x.transpose(1, 2)[..., None]))
        half = both.shape[1] // 2
        x = x + self.point(both[:, :half] * F.silu(both[:, half:]))[..., 0].transpose(1, 2)
        return self.leave(x)


class Modulated(nn.Module):
    """adaLN: six rows of one projection, and a table of the same, over a stream that they shift and scale."""

    def __init__(self):
        super().__init__()
        self.enter, self.time = nn.Linear(6, 12), nn.Linear(4, 2 * 12)
        self.table = nn.Parameter(torch.randn(2, 12))
        self.norm, self.leave = nn.LayerNorm(12, elementwise_affine=False), nn.Linear(12, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        rows = self.table[None] + self.time(time).reshape(1, 2, -1)
        shift, scale = (rows[:, i : i + 1] for i in range(2))
        return self.leave(self.norm(self.enter(x)) * (1 + scale) + shift)


class Shuffled(nn.Module):
    """Pixel shuffles, and a mean over channels as some write an RMSNorm."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8 * 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.enter(x), 2)
        return self.leave(x * torch.rsqrt(x.pow(2).mean(dim=1, keepdim=True) + 1e-6))


NETWORKS = {
    "residual": (Residual, ((1, 3, 8, 8),)),
    "depthwise": (Depthwise, ((1, 3, 8, 8),)),
    "grouped": (Grouped, ((1, 3, 8, 8),)),
    "transposed": (Transposed, ((1, 3, 4, 4),)),
    "concatenated": (Concatenated, ((1, 3, 8, 8),)),
    "shared": (Shared, ((1, 4, 5),)),
    "multi-head": (lambda: Attention(6), ((1, 7, 24),)),
    "multi-query": (lambda: Attention(1), ((1, 7, 24),)),
    "grouped-query": (lambda: Attention(2), ((1, 7, 24),)),
    "grouped-query-sdpa": (lambda: Attention(3, gqa=True), ((1, 7, 24),)),
    "wide-norm": (lambda: Attention(6, wide_norm=True), ((1, 7, 24),)),
    "gated": (Gated, ((1, 5, 6),)),
    "modulated": (Modulated, ((1, 5, 6), (1, 4))),
    "shuffled": (Shuffled, ((1, 3, 4, 4),)),
}


def random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval().requires_grad_(False)


def difference(program, module, inputs, share, seed):
    """Largest, over the largest output, between what `reduce` leaves and the masked network; and what was cut."""
    found = find(program)
    selection = chosen(found.spaces, share, seed)
    small = reduce(copy.deepcopy(module), to_pruning(found.spaces, selection), weights=True)
    with torch.no_grad():
        made, expected = small(*inputs), Masked(program, found, selection)(*inputs)
    made = (made,) if isinstance(made, Tensor) else made
    left = sum(one.numel() for one in small.parameters()) / sum(one.numel() for one in module.parameters())
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(made, expected, strict=True)), left


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_equals_the_masked_network(name, share):
    torch.manual_seed(0)
    make, shapes = NETWORKS[name]
    module = random(make())
    inputs = tuple(torch.randn(shape) for shape in shapes)
    found, left = difference(torch.export.export(module, inputs), module, inputs, share, seed=1)
    assert found < TOLERANCE
    assert left < 0.9


# What belongs to what


def kinds(name):
    make, shapes = NETWORKS[name]
    module = make().eval()
    found = find(torch.export.export(module, tuple(torch.randn(shape) for shape in shapes)))
    return {one.name: one for one in found.spaces.spaces}, {one.name: one.frozen for one in found.spaces.frozen}


def test_channels_of_a_residual_stream_are_one_space_with_its_norm_groups():
    spaces, frozen = kinds("residual")
    assert (spaces["enter"].count, spaces["enter"].groups) == (16, 4)
    assert {cut.parameter for cut in spaces["enter"].writes} == {
        "enter.weight",
        "enter.bias",
        "back.weight",
        "back.bias",
    }
    assert {cut.parameter for cut in spaces["enter"].reads} == {"inner.weight", "leave.weight"}
    assert spaces["inner"].count == 24
    assert "output" in frozen["leave"]


def test_a_grouped_convolution_ties_its_groups():
    spaces, _ = kinds("grouped")
    assert [(one.name, one.count) for one in spaces.values()] == [("enter", 4)]
    assert spaces["enter"].unit(1).writes[0].positions == (3, 4, 5)


def test_the_halves_of_a_gated_feed_forward_are_one_unit():
    spaces, _ = kinds("gated")
    assert (spaces["proj"].kind, spaces["proj"].count) == ("ffn", 14)
    assert spaces["proj"].unit(3).writes[0].positions == (3, 17)
    assert spaces["wide"].unit(0).slices[0].positions == (0, 9)
    assert any(cut.parameter == "norm.normalized_shape" for cut in spaces["enter"].cuts)


def test_one_key_and_value_for_all_heads_stays():
    spaces, frozen = kinds("multi-query")
    (heads,) = (one for one in spaces.values() if one.kind == "heads")
    assert heads.count == 6
    assert {cut.parameter for cut in heads.cuts} == {"to_q.weight", "to_q.bias", "to_out.weight"}
    assert "follows the width of a head" in frozen["to_k"]


@pytest.mark.parametrize(("name", "count"), [("grouped-query", 2), ("grouped-query-sdpa", 3), ("multi-head", 6)])
def test_heads_that_share_a_key_go_together(name, count):
    (heads,) = (one for one in kinds(name)[0].values() if one.kind == "heads")
    assert heads.count == count
    assert {cut.parameter for cut in heads.writes} >= {"to_q.weight", "to_k.weight", "to_v.weight"}


def test_a_tied_weight_ties_what_it_reads_to_what_it_writes():
    """`twice` is called on its own output, so its rows are its columns, and those of the stream."""
    spaces, _ = kinds("shared")
    assert [one.count for one in spaces.values()] == [16]


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.cumsum(self.enter(x), dim=-1))


def test_an_op_without_a_rule_freezes_what_reaches_it_and_is_named():
    found = find(torch.export.export(Odd().eval(), (torch.randn(1, 4),)))
    assert not found.spaces.spaces
    assert any("cumsum" in one.frozen for one in found.spaces.frozen)


class Picked(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x)[..., 2:3] + self.enter(x).select(-1, 3)[..., None])


def test_what_is_picked_by_its_position_stays():
    found = find(torch.export.export(Picked().eval(), (torch.randn(1, 4),)))
    assert not found.spaces.spaces


class Remembers(nn.Module):
    """`heads` is a number of its own; what is left of a head takes the width that is left over."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave, self.heads = nn.Linear(4, 12), nn.Linear(12, 2), 3

    def forward(self, x: Tensor) -> Tensor:
        q = self.enter(x)
        h = q.view(*q.shape[:2], self.heads, -1).transpose(1, 2)
        return self.leave(F.scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2))


class Halved(nn.Module):
    """Its halves meet at 6, whatever is left."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        both = self.enter(x)
        return self.leave(torch.relu(both[..., :6])) + both[..., 6:].sum()


@pytest.mark.parametrize("kind", [Remembers, Halved])
def test_a_module_that_remembers_its_size_is_refused(kind):
    module = kind().eval().requires_grad_(False)
    inputs = (TensorSpec(name="x", shape=(1, 5, 4)),)
    part = Component("model", module, inputs, (TensorSpec(name="y", shape=(1, 5, 2)),))
    found = find(capture(part))
    assert found.spaces.spaces
    selection = {one.name: tuple(range(1, one.count)) for one in found.spaces.spaces}
    with pytest.raises(EdgegenError, match="does not follow"):
        check(part, found, to_pruning(found.spaces, selection))


# Families


def test_a_diffusers_unet_with_attention_in_every_level_and_its_decoder_equal_theirs():
    """Its modules remember how many heads and channels they have, and are told."""
    student = new("sd-turbo", "tiny")
    part = student.components["denoiser"]
    config = dict(student.config.components["denoiser"].config)
    config["unet"] = {
        **config["unet"],
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    }
    torch.manual_seed(0)
    denoiser = Component("denoiser", build_module("diffusers_unet", config), part.inputs, part.outputs)
    for one in (denoiser, student.components["decoder"]):
        found, left = difference(capture(one), one.module, one.example_inputs(), 0.5, seed=3)
        assert found < 1e-3, one.name
        assert left < 0.5, one.name


@pytest.mark.parametrize("family", ["shapes", "sdxs-512", "snapgen", "snapgenpp", "mobilei2v"])
def test_families_equal_their_masked_networks(family, shapes):
    student = shapes if family == "shapes" else new(family, "tiny")
    for name in ("denoiser", "decoder"):
        part = student.components[name]
        program = capture(part)
        found, left = difference(program, part.module, part.example_inputs(), 0.5, seed=2)
        known = find(program)
        check(part, known, to_pruning(known.spaces, chosen(known.spaces, 0.5, seed=2)))
        assert found < 1e-3, name
        assert left < 0.75, name
