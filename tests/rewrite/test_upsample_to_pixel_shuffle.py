"""Nearest upsampling by two and a 3x3 convolution are a 2x2 convolution whose channels become pixels."""

import pytest
import torch
from torch import nn

from edgegen.graph.edit import weights
from edgegen.rewrite.base import census
from edgegen.rewrite.upsample_to_pixel_shuffle import UpsampleToPixelShuffle, phase_kernel

FORMS = ["pixel-shuffle", "permute"]
GONE = {"aten.upsample_nearest2d": 0, "aten.conv2d": 1}


class Up(nn.Module):
    def __init__(self, bias=True, by=2.0, **conv):
        super().__init__()
        self.by = by
        self.conv = nn.Conv2d(4, 6, **{"kernel_size": 3, "padding": 1, "bias": bias, **conv})

    def forward(self, x):
        return self.conv(nn.functional.interpolate(x, scale_factor=self.by))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_its_result_is_the_output(check_pass, form, bias):
    check_pass(UpsampleToPixelShuffle(form), Up(bias), torch.randn(2, 4, 3, 5), after=GONE)


class Between(Up):
    def forward(self, x):
        return super().forward(x * 2).relu()


@pytest.mark.parametrize("form", FORMS)
def test_between_other_calls(check_pass, form):
    check_pass(UpsampleToPixelShuffle(form), Between(), torch.randn(1, 4, 4, 2), after=GONE)


class ComputedBias(Up):
    def forward(self, x):
        up = nn.functional.interpolate(x, scale_factor=2.0)
        return nn.functional.conv2d(up, self.conv.weight, self.conv.bias * x.mean(), padding=1)


@pytest.mark.parametrize("form", FORMS)
def test_a_computed_bias_is_repeated(check_pass, form):
    check_pass(UpsampleToPixelShuffle(form), ComputedBias(), torch.randn(1, 4, 3, 3), after=GONE)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2), (5, 5)])
def test_every_border_pixel_is_exact(size):
    """Small integers: sums of them are exact in fp32, so nothing but equal numbers will do."""
    torch.manual_seed(0)
    x, weight = torch.randint(-9, 10, (2, 3, *size)).float(), torch.randint(-9, 10, (5, 3, 3, 3)).float()
    expected = nn.functional.conv2d(nn.functional.interpolate(x, scale_factor=2.0), weight, padding=1)
    phases = nn.functional.conv2d(x, phase_kernel(weight, True), padding=1)
    assert torch.equal(expected, nn.functional.pixel_shuffle(phases, 2)[:, :, 1:-1, 1:-1])


@pytest.mark.parametrize(("module", "reason"), [(Up(by=3.0), "not by two"), (Up(padding=0), "not 3x3")])
def test_declines(check_pass, module, reason):
    result = check_pass(UpsampleToPixelShuffle(), module, torch.randn(1, 4, 3, 5), modified=False)
    assert reason in result.declined[0].reason


@pytest.mark.parametrize("bias", [True, False])
def test_what_it_wrote_in_one_form_it_brings_to_the_other_with_the_same_codes(check_pass, bias):
    module, x = Between(bias), torch.randn(1, 4, 4, 2)
    shuffled = check_pass(UpsampleToPixelShuffle(), module, x, after={**GONE, "aten.pixel_shuffle": 1}).program
    turned = check_pass(UpsampleToPixelShuffle("permute"), shuffled, x, after={"aten.pixel_shuffle": 0}).program
    alone = check_pass(UpsampleToPixelShuffle("permute"), module, x).program
    assert census(turned) == census(alone)

    def kernels(program):
        found = [value for value in weights(program).values() if value.dim() == 4 and value.shape[0] == 24]
        return [sorted(map(tuple, one.flatten(1).tolist())) for one in found]

    assert kernels(turned) == kernels(shuffled) == kernels(alone)


def test_a_pixel_shuffle_of_the_model_stays(check_pass):
    module = nn.Sequential(nn.Conv2d(4, 24, 2, padding=1), nn.PixelShuffle(2))
    (declined,) = check_pass(
        UpsampleToPixelShuffle("permute"), module, torch.randn(1, 4, 3, 3), modified=False
    ).declined
    assert declined.op == "aten.pixel_shuffle" and "in the model" in declined.reason
