"""Intervals hold what a graph gives, and are as tight as known weights allow."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen.graph.evaluate import evaluate
from edgegen.graph.half_arithmetic import run_half, sqnr_db
from edgegen.graph.ranges.analyse import analyse
from edgegen.rewrite.to_half import ToHalf


def export(module, *inputs):
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs)


class Many(nn.Module):
    """One of almost everything that our students compute."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.down = nn.Conv2d(8, 8, 3, stride=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        self.layer_norm, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)
        self.project = nn.Linear(8, 24)
        self.table = nn.Embedding(5, 8)

    def forward(self, x, ids):
        h = F.silu(self.norm(self.conv(x)))
        h = F.interpolate(self.up(F.hardswish(self.down(h))), scale_factor=2.0)
        h = F.avg_pool2d(h, 2) + F.leaky_relu(h[:, :, ::2, ::2])
        t = h.flatten(2).transpose(1, 2) + self.table(ids).mean(1, keepdim=True)
        q, k, v = self.project(self.layer_norm(t)).chunk(3, -1)
        t = t + F.scaled_dot_product_attention(q, k, v)
        q, k = F.relu(q), F.softplus(k)
        t = t + (q @ (k.transpose(1, 2) @ v)) / ((q * k.sum(1, keepdim=True)).sum(-1, keepdim=True) + 1e-3)
        scores = (q @ k.transpose(1, 2)).masked_fill(torch.ones(64, 64).triu(1).bool(), -1e4).softmax(-1)
        t = self.rms(t) * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1) + scores @ v
        t = torch.cat([t.tanh(), t.abs().sqrt(), t.var(-1, keepdim=True), t.std(-1, keepdim=True)], -1)
        s = torch.where(t > 0, t.exp().clamp(max=3), t.cumsum(-1)) + t.square().log1p().cos()
        return F.pixel_shuffle(s.view(1, 64, 9, 2)[:, :4, :8], 2), (-s).amax(1), s.norm(dim=-1), 1 / (1 + s.relu())


@pytest.fixture(scope="module")
def many():
    torch.manual_seed(0)
    return export(Many(), torch.randn(1, 4, 9, 9), torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_no_value_leaves_its_interval(many, size):
    ranges = analyse(many, inputs={"x": (-size, size)})
    assert ranges.unknown == ("log1p",)
    for seed in range(4):
        torch.manual_seed(seed)
        x = (torch.rand(1, 4, 9, 9) * 2 - 1).sign() * size if seed % 2 else (torch.rand(1, 4, 9, 9) * 2 - 1) * size

        def watch(node, value):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                low, high = ranges.values[node.name].sound
                slack = 1e-4 * max(abs(low), abs(high)) if math.isfinite(low + high) else 0.0
                assert low - slack - 1e-6 <= value.min() and value.max() <= high + slack + 1e-6, node.format_node()

        evaluate(many, {"x": x, "ids": torch.randint(0, 5, (1, 3))}, watch)


def test_an_op_without_a_rule_may_give_anything(many):
    value = analyse(many).values["log1p"]
    assert not value.known and value.sound == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 5), (2, 6)),
        (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 3, 3)),
        (nn.Conv1d(3, 4, 2, bias=False), (1, 3, 2)),
    ],
)
def test_the_interval_of_known_weights_is_reached(module, shape):
    program = export(module, torch.zeros(shape))
    (low, high) = next(
        v for v in analyse(program, inputs={"input": (-2, 3)}).values.values() if v.op != "placeholder"
    ).sound
    spread = module.weight.flatten(1)
    highest = (spread.clamp(min=0) * 3 - spread.clamp(max=0) * 2).sum(1) + (0 if module.bias is None else module.bias)
    lowest = (-spread.clamp(min=0) * 2 + spread.clamp(max=0) * 3).sum(1) + (0 if module.bias is None else module.bias)
    assert high == pytest.approx(highest.max().item()) and low == pytest.approx(lowest.min().item())


class Channels(nn.Module):
    """One channel is large, and a weight that is 0 does not read it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)
        self.first.weight.data = torch.tensor([1e6, 1.0]).view(2, 1, 1, 1)
        self.second.weight.data = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_channels_are_told_apart():
    program = export(Channels(), torch.zeros(1, 1, 2, 2))
    assert analyse(program, inputs={"x": (-1, 1)}).values["conv2d_1"].sound == (0.0, 2.0)


def test_a_verdict_says_what_it_rests_on():
    program = export(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), torch.zeros(2, 4))
    sample = {"input": torch.randn(2, 4)}
    ranges = analyse(program, [sample], margin=3.0)
    limit = sample["input"].abs().max().item() * 3
    assert ranges.inputs["input"] == pytest.approx((-limit, limit)) and ranges.samples == 1
    value = ranges.values["softmax"]
    assert value.magnitude(100.0) == (1.0, "proven") and value.observed.low > 0
    assert ranges.values["linear"].magnitude(1.0)[1] == "observed"
    assert analyse(program).values["linear"].magnitude()[1] == "unknown"


def test_what_is_inside_an_op_is_seen():
    class Norms(nn.Module):
        def forward(self, x):
            return F.group_norm(x, 2) + F.layer_norm(x, (4,)) + x.mean(-1, keepdim=True)

    x = torch.randn(3, 8, 4) * 10
    inside = analyse(export(Norms(), x), [{"x": x}, {"x": x / 2}]).inside
    grouped = x.view(3, 2, 16) - x.view(3, 2, 16).mean(-1, keepdim=True)
    assert inside["group_norm"].step == pytest.approx(grouped.square().max().item(), rel=1e-5)
    assert inside["group_norm"].total == pytest.approx(grouped.square().sum(-1).max().item(), rel=1e-5)
    assert inside["group_norm"].least == pytest.approx(grouped.square().mean(-1).min().item() / 4, rel=1e-5)
    assert inside["mean"].total == pytest.approx(x.sum(-1).abs().max().item(), rel=1e-5)


def test_arithmetics_differ_in_what_they_round():
    class Sum(nn.Module):
        def forward(self, x):
            return x.sum(-1) / 1000, F.layer_norm(x, (4096,)), F.rms_norm(x, (4096,))

    x = torch.rand(2, 4096) * 40
    half = ToHalf()(export(Sum(), x)).program
    reference = evaluate(export(Sum(), x), {"x": x})
    levels = {
        kind: run_half(half, {"x": x / 2 if kind == "decomposed" else x}, kind) for kind in ("fused", "decomposed")
    }
    assert sqnr_db(reference[1], levels["fused"][1]) > 60 and sqnr_db(reference[1], levels["decomposed"][1]) > 50
    narrow = run_half(half, {"x": x}, "accumulating")
    assert not torch.isfinite(narrow[0]).any() and sqnr_db(reference[2], narrow[2]) < 20


def test_values_without_elements_have_bounds_too():
    class Padded(nn.Module):
        def forward(self, x):
            return x + F.pad(F.layer_norm(x[:, 4:].T, (1,)).T, (0, 4))

    program = export(Padded(), torch.randn(1, 4))
    assert any(0 in node.meta["val"].shape for node in program.graph.nodes if node.op == "call_function")
    ranges = analyse(program, [{"x": torch.ones(1, 4)}], inputs={"x": (-1, 1)})
    assert all(math.isfinite(one) for value in ranges.values.values() for one in value.sound)
