"""The reference adds int8 products as runtimes do: exactly."""

import pytest
import torch
from torch import nn

from edgegen.graph.edit import weights
from edgegen.graph.evaluate import evaluate
from edgegen.precision.encode import activation_qparams, encode_weight
from edgegen.precision.integers import evaluate_integers
from edgegen.precision.plan import OpPlan, Range
from edgegen.precision.quantize import quantized
from edgegen.precision.sites import sites

INPUT, OUTPUT = Range(low=-3.1, high=2.7), Range(low=0.0, high=5.3)


class Block(nn.Module):
    def __init__(self, channels, transposed=False):
        super().__init__()
        self.conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(channels, 6, 3, 1, 1)

    def forward(self, x):
        return torch.relu(self.conv(x))


def codes_by_hand(weight, bias, axis, x):
    """Of the relu's output, in int64 sums and two roundings to float32."""
    given, made = activation_qparams(INPUT), activation_qparams(OUTPUT)
    held = encode_weight(weight, OpPlan(op="conv", precision="w8"), axis)
    whole = (x / given.scale).round().clamp(-128 - given.zero_point, 127 - given.zero_point).double()
    conv = torch.conv_transpose2d if axis else torch.conv2d
    steps = held.scales * torch.tensor(given.scale)
    sums = conv(whole, held.codes.double(), (bias.double() / steps.double()).round(), 1, 1).float()
    factors = steps / torch.tensor(made.scale)
    return ((sums * factors.view(1, -1, 1, 1)).round() + made.zero_point).clamp(made.zero_point, 127), made


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [4, 96])
def test_codes_are_those_of_whole_sums(channels, transposed):
    torch.manual_seed(0)
    module = Block(channels, transposed).eval()
    x = torch.randn(1, channels, 40, 40)
    program = torch.export.export(module, (x,))
    (site,) = sites(program).values()
    op = OpPlan(op="conv", precision="w8a8", input=INPUT, output=OUTPUT)
    graph = quantized(program, {site.node: op})
    wanted, (scale, zero) = codes_by_hand(module.conv.weight, module.conv.bias.detach(), site.axis, x)
    (found,) = evaluate_integers(graph, {"x": x})
    assert torch.equal(found, (wanted - zero) * scale)
    (near,) = evaluate(graph, {"x": x})
    assert (near - found).abs().max() <= 1.001 * scale, "float sums may round a code to its neighbour"


def test_sums_that_float32_does_not_hold_are_exact_too():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3000, 2, bias=False)
            nn.init.constant_(self.linear.weight, 1.0)

        def forward(self, x):
            return self.linear(x)

    x = torch.full((1, 3000), 2.0)
    x[0, 0] = 1.0
    program = torch.export.export(Wide().eval(), (x,))
    (site,) = sites(program).values()
    range, out = Range(low=0.0, high=2.0), Range(low=0.0, high=6000.0)
    graph = quantized(program, {site.node: OpPlan(op="linear", precision="w8a8", input=range, output=out)})
    assert 255 * 127 * 3000 > 2**24
    (found,) = evaluate_integers(graph, {"x": x})
    given, made = activation_qparams(range), activation_qparams(out)
    sums = 127 * sum(min(round(float(one) / given.scale), 127 - given.zero_point) for one in x[0])
    scale = next(v for v in weights(graph).values() if v.dtype is torch.float32)
    step = torch.tensor(float(sums)) * (scale[0] * torch.tensor(given.scale) / torch.tensor(made.scale))
    assert float(found[0, 0]) == pytest.approx(round(float(step)) * made.scale, abs=made.scale / 4)


def test_float_ops_are_as_they_were():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()).eval()
    x = torch.randn(1, 3, 8, 8)
    program = torch.export.export(module, (x,))
    (site,) = sites(program).values()
    for op in (OpPlan(op="conv", precision="w8"), OpPlan(op="conv", precision="w8a8-dynamic")):
        graph = quantized(program, {site.node: op})
        (wanted,), (found,) = evaluate(graph, {"input": x}), evaluate_integers(graph, {"input": x})
        assert torch.equal(wanted, found)


def test_float16_rounds_floats_and_no_codes():
    """An int8 op alone gives the codes that it gives of the same input; a float op before it moves some of them."""
    torch.manual_seed(2)
    module, x = Block(8).eval(), torch.randn(1, 8, 20, 20)
    program = torch.export.export(module, (x,))
    (site,) = sites(program).values()
    op = OpPlan(op="conv", precision="w8a8", input=INPUT, output=OUTPUT)
    graph = quantized(program, {site.node: op})
    (exact,), (half,) = (
        evaluate_integers(graph, {"x": x.half().float()}),
        evaluate_integers(graph, {"x": x.half().float()}, half=True),
    )
    step = activation_qparams(OUTPUT).scale
    assert float((half - exact).abs().max()) <= 1e-3 * float(exact.abs().max()) < step, "the output's own rounding"
    (moved,) = evaluate_integers(graph, {"x": x}, half=True)
    (whole,) = evaluate_integers(graph, {"x": x})
    flipped = float(((moved - whole).abs() > step / 2).float().mean())
    assert 0 < flipped < 0.05
    (plain,) = evaluate(program, {"x": x})
    (rounded,) = evaluate_integers(program, {"x": x}, half=True)
    assert torch.equal(rounded, rounded.half().float()) and not torch.equal(rounded, plain)
