"""3-D convolutions as 2-D ones of stacked frames, or tap by tap."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgegen.rewrite.base import census
from edgegen.rewrite.conv3d_to_conv2d import Conv3dToConv2d

FORMS = ["frames", "taps"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kernel", "more"),
    [
        ((3, 1, 1), {"padding": (1, 0, 0)}),
        ((3, 3, 3), {"padding": 1}),
        ((2, 3, 2), {"bias": False}),
        ((1, 3, 3), {"padding": (0, 1, 1)}),
        ((3, 3, 3), {"stride": 2, "padding": 1}),
        ((3, 1, 1), {"padding": (2, 0, 0), "dilation": (2, 1, 1)}),
        ((3, 3, 3), {"padding": (4, 1, 1)}),
        ((5, 1, 1), {}),
    ],
)
def test_a_convolution_of_frames(check_pass, form, kernel, more):
    module = nn.Conv3d(3, 4, kernel, **more)
    check_pass(Conv3dToConv2d(form), module, torch.randn(2, 3, 5, 6, 4), after={"aten.conv3d": 0})


class Causal(nn.Module):
    """Two zero frames in front, none behind, as video decoders pad."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=(0, 1, 1))

    def forward(self, x):
        return F.silu(self.conv(F.pad(x, (0, 0, 0, 0, 2, 0))))


@pytest.mark.parametrize("form", FORMS)
def test_a_causal_convolution_reads_no_padding(check_pass, form):
    result = check_pass(Conv3dToConv2d(form), Causal(), torch.randn(1, 3, 4, 6, 4), after={"aten.conv3d": 0})
    pads = census(result.program)["aten.pad"] + census(result.program)["aten.constant_pad_nd"]
    assert pads == (0 if form == "frames" else 1)
    assert census(result.program)["aten.conv2d"] == (4 if form == "frames" else 3)


@pytest.mark.parametrize("form", FORMS)
def test_one_frame(check_pass, form):
    check_pass(Conv3dToConv2d(form), nn.Conv3d(3, 4, 3, padding=1), torch.randn(1, 3, 1, 6, 4))


def test_groups_are_for_taps(check_pass):
    module, x = nn.Conv3d(4, 4, 3, padding=1, groups=4), torch.randn(1, 4, 3, 5, 5)
    result = check_pass(Conv3dToConv2d(), module, x, modified=False)
    assert "groups" in result.declined[0].reason
    check_pass(Conv3dToConv2d("taps"), module, x, after={"aten.conv3d": 0})


class Computed(nn.Module):
    def forward(self, x, weight):
        return F.conv3d(x, weight * 2), F.conv3d(x, weight, padding="same")


def test_what_it_does_not_know_stays(check_pass):
    result = check_pass(
        Conv3dToConv2d(), Computed(), torch.randn(1, 2, 3, 4, 4), torch.randn(2, 2, 3, 3, 3), modified=False
    )
    assert [one.reason for one in result.declined] == ["its weight is computed", "its padding is a word"]
