"""SiLU and GELU whole or written out; what only looks like them stays."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgegen.rewrite.activation_form import ActivationForm
from edgegen.rewrite.approximate_gelu import ApproximateGelu
from edgegen.rewrite.base import census


class Wrap(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


X = torch.linspace(-4, 4, 33)
GELUS = [
    lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2.0))),
    lambda x: x * 0.5 * (1.0 + torch.erf(x * 0.7071067811865476)),
    lambda x: x * (torch.erf(x / 1.4142135) + 1.0) * 0.5,
]
TANH_GELUS = [
    lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))),
    lambda x: x * 0.5 * (1 + torch.tanh(0.7978845608 * (0.044715 * (x * x * x) + x))),
]


@pytest.mark.parametrize("function", [*GELUS, *TANH_GELUS])
def test_a_gelu_written_out_becomes_one_call(check_pass, function):
    result = check_pass(ActivationForm(), Wrap(function), X)
    assert census(result.program) == {"aten.gelu": 1}
    (gelu,) = (node for node in result.program.graph.nodes if node.op == "call_function")
    assert gelu.kwargs.get("approximate", "none") == ("tanh" if function in TANH_GELUS else "none")


@pytest.mark.parametrize("kind", ["none", "tanh"])
def test_a_gelu_is_written_out(check_pass, kind):
    split = Wrap(lambda x: F.gelu(x, approximate=kind) + x)
    result = check_pass(ActivationForm(gelu="split"), split, X, after={"aten.gelu": 0})
    check_pass(ActivationForm(), result.program, X, after={"aten.gelu": 1, "aten.mul": 0})


def test_the_tanh_form_alone_is_written_out(check_pass):
    both = Wrap(lambda x: F.gelu(x, approximate="tanh") + F.gelu(x))
    result = check_pass(ActivationForm(silu="keep", gelu="split-tanh"), both, X, after={"aten.gelu": 1, "aten.tanh": 1})
    assert not result.declined


@pytest.mark.parametrize("function", [lambda x: x * torch.sigmoid(x), lambda x: x.sigmoid() * x])
def test_silu_both_ways(check_pass, function):
    whole = check_pass(ActivationForm(), Wrap(function), X, after={"aten.silu": 1, "aten.mul": 0})
    check_pass(ActivationForm(silu="split"), whole.program, X, after={"aten.silu": 0, "aten.sigmoid": 1})


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x * torch.sigmoid(1.702 * x), None),
        (lambda x: F.hardswish(x), None),
        (lambda x: (gate := x.sigmoid()) * x + gate, None),
        (lambda x: 0.5 * x * (1 + torch.erf(x / 1.5)), "not GELU's"),
        (lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.05 * x**3))), "not GELU's"),
        (lambda x: 0.5 * x * (1 + torch.erf(x * x.mean())), "computed"),
    ],
)
def test_what_looks_like_them_stays(check_pass, function, why):
    result = check_pass(ActivationForm(), Wrap(function), X, modified=False)
    assert why is None or why in result.declined[0].reason


def test_the_other_gelu_is_another_function_and_says_so(check_pass):
    check_pass(ApproximateGelu(), Wrap(F.gelu), X)
    result = check_pass(ApproximateGelu("none"), Wrap(F.gelu), X, modified=False)
    assert "already" in result.declined[0].reason
    assert (F.gelu(X) - F.gelu(X, approximate="tanh")).abs().max() < 4.8e-4
