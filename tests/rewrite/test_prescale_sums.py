"""What does not depend on a scale can be divided; what does, is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.graph.evaluate import evaluate
from edgegen.rewrite.prescale_sums import PrescaleSums
from tests.rewrite.conftest import export


class LinearAttention(nn.Module):
    def forward(self, q, k, v):
        q, k = F.relu(q), F.relu(k)
        out = (F.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(1, 2)) @ q
        return out[:, :-1] / (out[:, -1:] + 1e-6)


class RMSNorm(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) + x


class UnitLength(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


class HandMadeGroupNorm(nn.Module):
    """As `explicit-group-norm` writes it: averages by constant convolutions, epsilon as a bias."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.full((8, 4, 1, 1), 0.25))
        self.register_buffer("eps", torch.full((8,), 1e-5))

    def forward(self, x):
        centred = x - F.conv2d(x.mean((2, 3), keepdim=True), self.average, groups=2)
        squares = (centred * centred).mean((2, 3), keepdim=True)
        return centred * torch.rsqrt(F.conv2d(squares, self.average, self.eps, groups=2))


class Norms(nn.Module):
    def forward(self, x):
        return F.layer_norm(x, (8,)) + F.rms_norm(x, (8,), eps=1e-6) + F.group_norm(x[..., None], 2)[..., 0]


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=0.1)


def three(*shape):
    return tuple(torch.randn(shape) for _ in range(3))


CASES = [
    (PrescaleSums((("relu_1", "matmul", 5), ("matmul", "matmul_1", 6))), LinearAttention(), three(1, 4, 16), 2),
    (PrescaleSums((("x", "pow_1", 4),)), RMSNorm(), (torch.randn(3, 8),), 2),
    (PrescaleSums((("x", "linalg_vector_norm", 7),)), UnitLength(), (torch.randn(3, 8),), 1),
    (PrescaleSums((("sub", "mul", 3),)), HandMadeGroupNorm(), (torch.randn(1, 8, 4, 4),), 3),
    (
        PrescaleSums((("x", "layer_norm", 3), ("x", "rms_norm", -2), ("unsqueeze", "group_norm", 1))),
        Norms(),
        (torch.randn(4, 8),),
        3,
    ),
    (PrescaleSums((("q", "scaled_dot_product_attention", 3),)), Attention(), three(1, 2, 4, 8), 1),
]


@pytest.mark.parametrize(("one", "module", "inputs", "muls"), CASES)
def test_a_formula_without_scale_is_divided_inside(check_pass, one, module, inputs, muls):
    result = check_pass(one, module, *inputs, after={"aten.mul": muls})
    assert not result.declined


def test_what_is_inside_gets_smaller_and_the_epsilon_with_it():
    x = torch.randn(3, 8) * 1000
    program = export(RMSNorm(), x)
    rewritten = PrescaleSums((("x", "pow_1", 4),))(program).program
    seen = {}
    evaluate(rewritten, {"x": x}, lambda node, value: seen.__setitem__(node.name, value))
    torch.testing.assert_close(seen["pow_1"], (x / 16) ** 2)
    assert next(node.args[1] for node in rewritten.graph.nodes if node.name == "add") == 1e-6 / 256
    residual = next(node for node in rewritten.graph.nodes if node.name == "add_1")
    assert residual.args[1].name == "x", "the residual reads the value itself"


class ReadElsewhere(nn.Module):
    """The sum of squares is wanted as it is."""

    def forward(self, x):
        squares = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(squares + 1e-6), squares


class NotHomogeneous(nn.Module):
    def forward(self, x):
        return x / x.pow(2).sum(-1, keepdim=True).exp()


class FeedsOutput(nn.Module):
    def forward(self, x):
        return x.pow(2).sum(-1)


@pytest.mark.parametrize("module", [ReadElsewhere(), NotHomogeneous(), FeedsOutput()])
def test_what_depends_on_the_scale_stays(check_pass, module):
    result = check_pass(PrescaleSums((("x", "pow_1", 4),)), module, torch.randn(3, 8), modified=False)
    assert "depends on its scale" in result.declined[0].reason


def test_a_name_that_is_not_there():
    with pytest.raises(EdgegenError, match="no value `gone`"):
        PrescaleSums((("gone", "pow_1", 4),))(export(RMSNorm(), torch.randn(3, 8)))
