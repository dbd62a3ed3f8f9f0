"""Guidance of scale 1 computes the conditional half alone; what mixes the batch stays whole."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgegen.errors import EdgegenError
from edgegen.graph.edit import user_inputs
from edgegen.rewrite.bind_input import BindInput
from edgegen.rewrite.drop_dead_guidance import DropDeadGuidance
from edgegen.rewrite.drop_unused_inputs import DropUnusedInputs
from edgegen.rewrite.fold_constants import FoldConstants
from edgegen.rewrite.pipeline import Pipeline


class Core(nn.Module):
    """A resnet block and cross-attention of tokens, batch by batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(6, 16), nn.Conv2d(8, 4, 1)
        self.gain = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x, context):
        h = F.silu(self.norm(self.conv(x))) * self.gain
        b, c, height, width = h.shape
        tokens = h.flatten(2).transpose(1, 2)
        q = self.q(F.layer_norm(tokens, (c,))).view(b, -1, 2, 4).transpose(1, 2)
        k, v = (one.view(b, -1, 2, 4).transpose(1, 2) for one in self.k(context).chunk(2, -1))
        tokens = tokens + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = torch.cat([tokens.transpose(1, 2).reshape(b, c, height, width), h.mean(1, keepdim=True)], 1)[:, :8]
        return self.out(F.interpolate(h, scale_factor=2.0))


def plain(u, c, s):
    return u + s * (c - u)


class Guided(nn.Module):
    def __init__(self, combine=plain, scale=1.0, join="cat", order="uncond first", core=None):
        super().__init__()
        self.core = Core() if core is None else core
        self.combine, self.scale, self.join, self.order = combine, scale, join, order

    def forward(self, x, context):
        both = torch.cat([x, x]) if self.join == "cat" else x.repeat(2, 1, 1, 1)
        out = self.core(both, context)
        first, second = out.chunk(2) if self.join == "cat" else (out[: x.shape[0]], out[x.shape[0] :])
        u, c = (first, second) if self.order == "uncond first" else (second, first)
        return self.combine(u, c, self.scale)


INPUTS = (torch.randn(1, 4, 4, 4), torch.randn(2, 5, 6))


def batches(program):
    calls = [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and "core" in str(node.meta.get("nn_module_stack"))
    ]
    return {node.meta["val"].shape[0] for node in calls if isinstance(node.meta["val"], torch.Tensor)}


@pytest.mark.parametrize("join", ["cat", "repeat"])
@pytest.mark.parametrize("order", ["uncond first", "cond first"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_conditional_half_is_computed_alone(check_pass, join, order, batch):
    inputs = (torch.randn(batch, 4, 4, 4), torch.randn(2 * batch, 5, 6))
    gone = {"aten.sub": 0, "aten.repeat": 0, "aten.conv2d": 2}
    result = check_pass(DropDeadGuidance(), Guided(join=join, order=order), *inputs, before={"aten.sub": 1}, after=gone)
    assert batches(result.program) <= {batch, 2 * batch} and batch in batches(result.program)
    last = [node for node in result.program.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert all(node.meta["val"].shape[0] == batch for node in last)


@pytest.mark.parametrize(
    "combine",
    [
        lambda u, c, s: u + (c - u),
        lambda u, c, s: c + 0.0 * (c - u),
        lambda u, c, s: u * 0.0 + 1.0 * c,
        lambda u, c, s: torch.lerp(u, c, 1.0),
    ],
)
def test_guidance_is_written_in_many_ways(check_pass, combine):
    check_pass(DropDeadGuidance(), Guided(combine), *INPUTS, after={"aten.sub": 0, "aten.lerp": 0, "aten.chunk": 1})


class Bound(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = Core()

    def forward(self, x, cond, uncond, guidance_scale):
        out = self.core(torch.cat([x, x]), torch.cat([uncond, cond]))
        u, c = out.chunk(2)
        return u + (guidance_scale * 1.0)[:, None, None, None] * (c - u)


def test_a_bound_scale_leaves_the_unconditional_input_unread():
    inputs = (torch.randn(1, 4, 4, 4), torch.randn(1, 5, 6), torch.randn(1, 5, 6), torch.ones(1))
    module = Bound().eval()
    with torch.no_grad():
        program, expected = torch.export.export(module, inputs), module(*inputs)
    passes = (BindInput("guidance_scale", (1.0,)), FoldConstants(), DropDeadGuidance(), DropUnusedInputs())
    program, records = Pipeline(passes).run(program)
    assert all(record.modified for record in records), records
    assert [node.name for node in user_inputs(program)] == ["x", "cond"]
    torch.testing.assert_close(program.module()(*inputs[:2]), expected, rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = Core()

    def forward(self, x, uncond, cond):
        u, c = self.core(x, uncond), self.core(x, cond)
        return u + 1.0 * (c - u)


def test_two_calls_of_the_network_become_one(check_pass):
    inputs = (INPUTS[0], torch.randn(1, 5, 6), torch.randn(1, 5, 6))
    check_pass(DropDeadGuidance(), Twice(), *inputs, before={"aten.conv2d": 4}, after={"aten.conv2d": 2})


class Mixes(Core):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, context):
        out = super().forward(x, context)
        if self.how == "mean":
            return out - out.mean(0, keepdim=True)
        if self.how == "flip":
            return out.flip(0)
        return out.transpose(0, 1).relu().transpose(0, 1)


@pytest.mark.parametrize("how", ["mean", "flip", "transpose"])
def test_a_network_that_mixes_the_batch_stays(check_pass, how):
    result = check_pass(DropDeadGuidance(), Guided(core=Mixes(how)), *INPUTS, modified=False)
    assert ("twice" if how == "mean" else "mixes") in result.declined[0].reason


class AlsoReturns(Guided):
    def forward(self, x, context):
        out = self.core(torch.cat([x, x]), context)
        u, c = out.chunk(2)
        return u + 1.0 * (c - u), out.exp()


def test_what_is_read_otherwise_is_not_computed_twice(check_pass):
    result = check_pass(DropDeadGuidance(), AlsoReturns(), *INPUTS, modified=False)
    assert "twice" in result.declined[0].reason


@pytest.mark.parametrize("scale", [7.5, -1.0])
def test_live_guidance_stays(check_pass, scale):
    result = check_pass(DropDeadGuidance(), Guided(scale=scale), *INPUTS, modified=False)
    assert "constant 1" in result.declined[0].reason


class Residual(nn.Module):
    def forward(self, x, y):
        return x + (y.exp() - x)


def test_sums_that_are_no_guidance_stay(check_pass):
    check_pass(DropDeadGuidance(), Residual(), torch.randn(2, 3), torch.randn(2, 3), modified=False)


class Scales(nn.Module):
    def forward(self, x, factor):
        return x * factor


@pytest.mark.parametrize("value", [(2.5,), (2.5, 2.5, 2.5)])
def test_an_input_is_bound(check_pass, value):
    result = check_pass(BindInput("factor", value), Scales(), torch.randn(2, 3), torch.full((3,), 2.5))
    assert [node.name for node in user_inputs(result.program)] == ["x"]


def test_inputs_that_cannot_be_bound():
    program = torch.export.export(Scales(), (torch.randn(2, 3), torch.randn(3)))
    assert not BindInput("missing", (1.0,))(program).modified
    with pytest.raises(EdgegenError, match="3 elements, 2 values"):
        BindInput("factor", (1.0, 2.0))(program)

    class Returns(nn.Module):
        def forward(self, x, y):
            return x + y, y

    result = BindInput("y", (1.0,))(torch.export.export(Returns(), (torch.randn(3), torch.randn(3))))
    assert not result.modified and "output" in result.declined[0].reason
