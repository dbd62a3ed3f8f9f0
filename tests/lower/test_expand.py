"""Decomposing call by call gives what torch's own decomposition gives, and refuses what it cannot do."""

from collections import Counter

import pytest
import torch
from torch import nn

from edgegen.graph.evaluate import evaluate
from edgegen.lower.expand import NotExpandable, expand, needs_expansion
from edgegen.students.networks.unet import UNet, UNetConfig

aten = torch.ops.aten
CORE = dict(torch._decomp.core_aten_decompositions().items())


def export(module, *inputs):
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs)


def census(program):
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return Counter(str(target) for target in calls if "getitem" not in str(target))


def values(program, *inputs):
    return evaluate(program, dict(zip(program.graph_signature.user_inputs, inputs, strict=True)))


class Mixed(nn.Module):
    """Composites, a call with several results, a view of what is permuted, a constant, an alias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.linear = nn.Linear(6, 8)

    def forward(self, x):
        y = nn.functional.silu(self.norm(self.conv(x))).flatten(2).transpose(1, 2).contiguous()
        a, b = self.linear(y).chunk(2, dim=-1)
        values, places = (a * nn.functional.gelu(b)).detach().max(dim=-1)
        return values.permute(1, 0).reshape(-1) + torch.arange(16), places


@pytest.mark.parametrize("table", [CORE, {}])
def test_same_operators_and_numbers_as_run_decompositions(table):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, 4)
    program = export(Mixed(), x)
    text = str(program.graph)
    expanded = expand(program, table)
    assert str(program.graph) == text
    assert needs_expansion(program, table) and not needs_expansion(expanded, table)
    whole = program.run_decompositions(table or {torch._ops.OperatorBase(): lambda: None})
    assert census(expanded)["aten.convolution.default" if table else "aten.conv2d.default"] == 1
    missing = census(whole) - census(expanded)
    assert not missing - Counter({"aten.alias.default": 1}), missing
    for ours, theirs in zip(values(expanded, x), values(program, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_unet_keeps_names_shapes_and_module_paths():
    config = UNetConfig(
        sample_size=8, block_out_channels=(8, 16), cross_attention=(False, True), num_heads=2, norm_num_groups=4
    )
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([9.0]), torch.randn(1, 3, 768)
    program = export(UNet(config), *inputs)
    expanded = expand(program, CORE)
    assert expanded.graph_signature.user_inputs == program.graph_signature.user_inputs
    assert expanded.state_dict.keys() == program.state_dict.keys()
    for node in expanded.graph.nodes:
        if node.op == "call_function":
            assert node.meta["nn_module_stack"] and node.meta["val"] is not None and "tensor_meta" in node.meta
    (ours,), (theirs,) = values(expanded, *inputs), values(program, *inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def replaced(program, op, function):
    """`program` with a Python function in the place of an operator, as converters leave it."""
    for node in program.graph.nodes:
        if node.target is op:
            node.target = function
    return program


def test_python_functions_are_taken_apart_and_composites_in_them_are_kept():
    def transposed(x, scale=2.0):
        y = aten.upsample_nearest2d.vec(x.permute(0, 1, 3, 2).contiguous(), None, [scale, scale])
        y += 1
        return y

    x = torch.randn(1, 2, 3, 4)
    program = replaced(export(ReLU(), x), aten.relu.default, transposed)
    expanded = expand(program, {})
    assert census(expanded) == Counter(
        {
            "aten.permute.default": 1,
            "aten.clone.default": 1,
            "aten.upsample_nearest2d.vec": 1,
            "aten.add.Tensor": 1,
            "aten.neg.default": 1,
        }
    )
    (found,) = values(expanded, x)
    torch.testing.assert_close(found, -(nn.functional.interpolate(x.transpose(2, 3), scale_factor=2.0) + 1))


class ReLU(nn.Module):
    def forward(self, x):
        return -torch.relu(x)


def test_a_view_of_what_came_to_lie_otherwise_in_memory_is_copied_first():
    class Viewed(nn.Module):
        def forward(self, x):
            return torch.relu(x).view(2, 12)

    x = torch.randn(2, 3, 4)
    program = replaced(
        export(Viewed(), x), aten.relu.default, lambda x: x.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    )
    (found,) = values(expand(program, {}), x)
    torch.testing.assert_close(found, x.reshape(2, 12))


def test_a_mutation_of_what_only_a_dead_view_shares_is_no_mutation():
    """As a converter's convolution over one pixel: permuted, it lies in memory as it was, so the sum is over a view."""

    def biased(x):
        y = (x * 2).permute(0, 2, 3, 1).contiguous()
        y += 1
        return y

    x = torch.randn(1, 4, 1, 1)
    (found,) = values(expand(replaced(export(ReLU(), x), aten.relu.default, biased), {}), x)
    torch.testing.assert_close(found, -(2 * x.permute(0, 2, 3, 1) + 1))


def into_input(x):
    return x.add_(1)


def under_a_view(x):
    y = x * 2
    z = y.view(-1)
    y += 1
    return z


def into_a_view_of_the_input(x):
    y = x.view(-1)
    y += 1
    return y


def from_numbers(x):
    return x + torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("function", [into_input, into_a_view_of_the_input, under_a_view, from_numbers])
def test_refuses_what_only_the_whole_program_shows(function):
    x = torch.randn(3, 2)
    program = replaced(export(ReLU(), x), aten.relu.default, function)
    with pytest.raises(NotExpandable):
        expand(program, {})


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x * self.count


def test_refuses_a_program_that_mutates_its_buffers():
    program = export(Counts(), torch.randn(2)).run_decompositions({})
    with pytest.raises(NotExpandable, match="mutation"):
        expand(program, CORE)
