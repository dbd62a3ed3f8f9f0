"""Counts against numbers worked out by hand, and against torch's own flop counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgegen.graph.capture import capture
from edgegen.graph.count import GraphCount, count
from edgegen.students.networks.unet import UNet, UNetConfig


class Apply(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def counted(module: nn.Module, *inputs: torch.Tensor) -> GraphCount:
    return count(torch.export.export(module.eval(), inputs))


BY_HAND = [
    # out 2 x 8 x 5 x 5 values (stride 2), each 6 * 3 * 3 products
    (nn.Conv2d(6, 8, 3, stride=2, padding=1), [(2, 6, 10, 10)], 2 * 8 * 25 * 54, 8 * 54 + 8),
    # four groups: each output value sees 2 of 8 channels
    (nn.Conv2d(8, 12, 3, groups=4), [(1, 8, 7, 7)], 12 * 25 * 2 * 9, 12 * 18 + 12),
    (nn.Conv2d(8, 8, 3, groups=8, bias=False), [(1, 8, 7, 7)], 8 * 25 * 9, 72),
    # every one of 6 x 16 input values feeds 4 x 16 products
    (nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1), [(1, 6, 4, 4)], 6 * 16 * 4 * 16, 6 * 64 + 4),
    (nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), [(1, 6, 4, 4)], 6 * 16 * 2 * 4, 6 * 2 * 4 + 4),
    (nn.Conv1d(3, 5, 2), [(1, 3, 9)], 5 * 8 * 6, 35),
    (nn.Conv3d(2, 3, 2), [(1, 2, 3, 3, 3)], 3 * 8 * 16, 51),
    (nn.Linear(7, 11), [(2, 3, 7)], 6 * 11 * 7, 88),
    (Apply(torch.mm), [(3, 4), (4, 5)], 60, 0),
    (Apply(torch.bmm), [(2, 3, 4), (2, 4, 5)], 120, 0),
    (Apply(torch.addmm), [(5,), (3, 4), (4, 5)], 60, 0),
    (Apply(torch.baddbmm), [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 120, 0),
    (Apply(torch.matmul), [(2, 6, 3, 4), (2, 6, 4, 5)], 12 * 60, 0),
    (Apply(torch.matmul), [(3, 4), (4,)], 12, 0),
    # L 9, S 7, E 4, V 4, 6 heads of a batch of 2
    (Apply(F.scaled_dot_product_attention), [(2, 6, 9, 4), (2, 6, 7, 4), (2, 6, 7, 4)], 12 * 9 * 7 * 8, 0),
    (Apply(F.scaled_dot_product_attention), [(1, 1, 9, 4), (1, 1, 7, 4), (1, 1, 7, 6)], 9 * 7 * 10, 0),
    (nn.GroupNorm(2, 4), [(1, 4, 3, 3)], 0, 8),
]


@pytest.mark.parametrize(("module", "shapes", "macs", "parameters"), BY_HAND)
def test_by_hand(module, shapes, macs, parameters):
    found = counted(module, *(torch.randn(shape) for shape in shapes))
    assert (found.macs, found.parameters, found.parameter_bytes) == (macs, parameters, 4 * parameters)
    assert found.uncounted == {}


@pytest.mark.parametrize(("module", "shapes", "macs", "parameters"), [BY_HAND[0], BY_HAND[3], BY_HAND[7]])
def test_decomposed_to_core_aten_the_macs_stay(module, shapes, macs, parameters):
    program = torch.export.export(module.eval(), tuple(torch.randn(shape) for shape in shapes))
    found = count(program.run_decompositions())
    assert (found.macs, found.parameters) == (macs, parameters)


def test_tied_weights_count_once_and_views_of_one_storage_twice():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    assert counted(Tied(), torch.randn(1, 4)).parameters == 16
    halves = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    storage = torch.randn(8, 4)
    for index, half in enumerate(halves):
        half.weight = nn.Parameter(storage[4 * index : 4 * index + 4])
    assert counted(nn.Sequential(*halves), torch.randn(1, 4)).parameters == 32


def test_a_product_without_a_rule_is_listed():
    found = counted(Apply(lambda a, b: torch.einsum("ij,kj->ik", a, b)), torch.randn(2, 3), torch.randn(4, 3))
    assert found.uncounted == {"aten.einsum": 1} or found.macs == 24


def test_ops_are_ranked():
    found = counted(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(1, 4))
    assert found.ops == {"aten.linear": 2, "aten.relu": 1}
    assert list(found.ops) == ["aten.linear", "aten.relu"]
    assert found.macs_by_op == {"aten.linear": 32}


@pytest.mark.parametrize("name", ["text_encoder", "denoiser", "decoder"])
def test_the_tiny_student_against_torchs_counter(tiny, name):
    part = tiny.components[name]
    found = count(capture(part))
    assert found.parameters == sum(p.numel() for p in part.module.parameters())
    # The fused CPU kernel is one that torch's counter has no rule for; the mathematical form it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        part.module(*part.example_inputs())
    assert found.macs * 2 == counter.get_total_flops() > 0
    assert found.uncounted == {}


def test_sdxs_512_has_its_published_size():
    """SDXS-512-DreamShaper (arXiv 2403.16627) without a mid block, on SD 1.5's text encoder."""
    with torch.device("meta"):
        network = UNet(UNetConfig(sample_size=64, cross_attention_dim=768))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 315.7
