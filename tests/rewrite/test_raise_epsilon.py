"""Epsilons are raised where they are told to be, and never lowered."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.rewrite.raise_epsilon import RaiseEpsilon


class Denominator(nn.Module):
    def forward(self, x, y):
        return x / (y + 1e-8), x / y.clamp(min=1e-12), x / y.clamp_min(1e-9)


class Norms(nn.Module):
    def forward(self, x):
        return F.layer_norm(x, (8,), eps=1e-9) + F.rms_norm(x, (8,)) + F.group_norm(x[..., None], 2, eps=1e-10)[..., 0]


def epsilons(program, op):
    return [n.args[-1] if not n.kwargs.get("min") else n.kwargs["min"] for n in program.graph.nodes if op in n.name]


def test_denominators(check_pass):
    one = RaiseEpsilon((("add", 2.0**-14), ("clamp", 2.0**-14), ("clamp_min", 2.0**-14)))
    result = check_pass(one, Denominator(), torch.randn(4), torch.rand(4) + 0.5)
    for op in ("add", "clamp", "clamp_min"):
        assert epsilons(result.program, op)[0] == 2.0**-14


def test_norms_that_feed_the_output(check_pass):
    one = RaiseEpsilon((("layer_norm", 2.0**-16), ("rms_norm", 2.0**-16), ("group_norm", 2.0**-16)))
    check_pass(one, Norms(), torch.randn(4, 8))


def test_an_epsilon_is_never_lowered(check_pass):
    result = check_pass(
        RaiseEpsilon((("add", 1e-9),)), Denominator(), torch.randn(4), torch.rand(4) + 1, modified=False
    )
    assert "already" in result.declined[0].reason


def test_what_has_no_epsilon_is_declined(check_pass):
    result = check_pass(
        RaiseEpsilon((("div", 1e-4),)), Denominator(), torch.randn(4), torch.rand(4) + 1, modified=False
    )
    assert "no epsilon" in result.declined[0].reason


def test_a_name_that_is_not_there():
    program = torch.export.export(Denominator(), (torch.randn(4), torch.rand(4)))
    with pytest.raises(EdgegenError, match="no call `gone`"):
        RaiseEpsilon((("gone", 1e-4),))(program)
