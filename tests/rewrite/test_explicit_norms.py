"""GroupNorm, LayerNorm and RMSNorm written out: same numbers, also where the mean is far from zero."""

import pytest
import torch
from torch import nn

from edgegen.rewrite.explicit_group_norm import ExplicitGroupNorm
from edgegen.rewrite.explicit_layer_norm import ExplicitLayerNorm
from edgegen.rewrite.explicit_rms_norm import ExplicitRmsNorm

GROUP_FORMS = ["grouped-conv", "dense-conv", "linear"]
LAYER_FORMS = ["linear-mean", "mean"]


def randomise(module):
    """Affine weights that are not the ones and zeros of a fresh norm."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn_like(weight))
    return module


class InTheMiddle(nn.Module):
    """A norm between other calls; its value is read twice."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        y = self.norm(x * 2)
        return torch.sigmoid(y) * y


@pytest.mark.parametrize("form", GROUP_FORMS)
@pytest.mark.parametrize("batch", [1, 2])
def test_group_norm(check_pass, form, batch):
    module = InTheMiddle(randomise(nn.GroupNorm(4, 12, eps=1e-3)))
    x = torch.randn(batch, 12, 5, 7) * 3 + 10 * torch.randn(1, 12, 1, 1)
    gone = {"aten.group_norm": 0, "aten.expand": 0, "aten.mean": 2}
    check_pass(ExplicitGroupNorm(form), module, x, before={"aten.group_norm": 1}, after=gone)


@pytest.mark.parametrize("form", GROUP_FORMS)
def test_positive_weights_of_a_group_norm_go_under_the_root(check_pass, form):
    module = randomise(nn.GroupNorm(4, 12, eps=1e-3))
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.07, 15, 12))
    x = torch.randn(2, 12, 5, 7) * 3 + 10 * torch.randn(1, 12, 1, 1)
    check_pass(ExplicitGroupNorm(form), module, x, after={"aten.mul": 2})
    for odd in (0.0, -1.0, 0.01, 20.0):
        with torch.no_grad():
            module.weight[3] = odd
        check_pass(ExplicitGroupNorm(form), module, x, after={"aten.mul": 3})


@pytest.mark.parametrize("form", GROUP_FORMS)
def test_group_norm_may_feed_the_output_and_have_no_affine(check_pass, form):
    after = {"aten.group_norm": 0, "aten.mul": 2, "aten.add": 0}
    check_pass(ExplicitGroupNorm(form), nn.GroupNorm(2, 6, affine=False), torch.randn(1, 6, 4, 4), after=after)


def test_group_norm_keeps_its_digits_far_from_zero(check_pass):
    """mean(x^2) - mean(x)^2 would be off by several per cent here."""
    x = torch.randn(1, 8, 16, 16, dtype=torch.float64) + 1000
    exact = nn.functional.group_norm(x, 2).float()
    result = check_pass(ExplicitGroupNorm(), nn.GroupNorm(2, 8, affine=False), x.float(), tolerance=1e-4)
    torch.testing.assert_close(result.program.module()(x.float()), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (1, 6, 2, 3, 4)])
def test_group_norm_of_another_rank_stays(check_pass, shape):
    result = check_pass(ExplicitGroupNorm(), nn.GroupNorm(2, 6), torch.randn(shape), modified=False)
    assert "[N, C, H, W]" in result.declined[0].reason


class Computed(nn.Module):
    """A conditional norm: its weight is an input."""

    def forward(self, x, weight):
        return nn.functional.group_norm(x, 2, weight * 2)


def test_group_norm_with_a_computed_weight_stays(check_pass):
    result = check_pass(ExplicitGroupNorm(), Computed(), torch.randn(1, 4, 2, 2), torch.randn(4), modified=False)
    assert "no constant" in result.declined[0].reason


@pytest.mark.parametrize("form", LAYER_FORMS)
@pytest.mark.parametrize(("one", "kind"), [(ExplicitLayerNorm, nn.LayerNorm), (ExplicitRmsNorm, nn.RMSNorm)])
def test_norms_over_the_last_axis(check_pass, form, one, kind):
    op = "aten.layer_norm" if kind is nn.LayerNorm else "aten.rms_norm"
    module = InTheMiddle(randomise(kind(24, eps=1e-3)))
    check_pass(one(form), module, torch.randn(2, 5, 24) * 3 + 4, before={op: 1}, after={op: 0, "aten.rsqrt": 1})


@pytest.mark.parametrize("form", LAYER_FORMS)
@pytest.mark.parametrize(("one", "kind"), [(ExplicitLayerNorm, nn.LayerNorm), (ExplicitRmsNorm, nn.RMSNorm)])
def test_they_may_feed_the_output_and_have_no_affine(check_pass, form, one, kind):
    check_pass(one(form), kind(8, elementwise_affine=False), torch.randn(1, 3, 8))


@pytest.mark.parametrize(("one", "kind"), [(ExplicitLayerNorm, nn.LayerNorm), (ExplicitRmsNorm, nn.RMSNorm)])
def test_norms_over_several_axes_stay(check_pass, one, kind):
    result = check_pass(one(), kind([3, 4]), torch.randn(2, 3, 4), modified=False)
    assert "last 2 axes" in result.declined[0].reason


def test_layer_norm_keeps_its_digits_far_from_zero(check_pass):
    x = torch.randn(1, 4, 64) + 300
    check_pass(ExplicitLayerNorm(), nn.LayerNorm(64, elementwise_affine=False), x, tolerance=1e-4)
