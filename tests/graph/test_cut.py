"""A graph cut into parts computes what the whole does, and carries little across."""

from __future__ import annotations

import pytest
import torch
from torch.export import ExportedProgram

from edgegen.errors import EdgegenError
from edgegen.graph.cut import Part, cut
from edgegen.graph.evaluate import evaluate
from edgegen.graph.liveness import footprint, weight_bytes
from edgegen.rewrite.to_half import ToHalf
from edgegen.students.networks.unet import UNet, UNetConfig


@pytest.fixture(scope="module")
def unet() -> ExportedProgram:
    torch.manual_seed(0)
    config = UNetConfig(sample_size=8, block_out_channels=(32, 64), cross_attention=(False, True), num_heads=2)
    given = (torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 5, config.cross_attention_dim))
    program = torch.export.export(UNet(config).eval(), given)
    assert isinstance(program, ExportedProgram)
    return program


def run(parts: tuple[Part, ...], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    held = dict(inputs)
    for part in parts:
        held |= zip(part.outputs, evaluate(part.program, {name: held[name] for name in part.inputs}), strict=True)
    return held["prediction"]


def inputs_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.target is None]
    torch.manual_seed(1)
    return {name: torch.randn(value.shape) for name, value in zip(names, program.example_inputs[0], strict=True)}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_compute_what_the_whole_does(unet: ExportedProgram, count: int) -> None:
    given = inputs_of(unet)
    parts = cut(unet, count, ["prediction"])
    assert len(parts) == count
    (whole,) = evaluate(unet, given)
    assert torch.equal(run(parts, given), whole)


def test_parts_share_the_weights_about_evenly(unet: ExportedProgram) -> None:
    sizes = [weight_bytes(part.program) for part in cut(unet, 3, ["prediction"])]
    assert sum(sizes) == weight_bytes(unet)
    assert max(sizes) < 1.4 * sum(sizes) / 3


def test_float16_is_carried_as_float32(unet: ExportedProgram) -> None:
    half = ToHalf()(unet).program
    given = inputs_of(half)
    parts = cut(half, 2, ["prediction"])
    assert torch.equal(run(parts, given), evaluate(half, given)[0])
    for part in parts:
        dtypes = {node.meta["val"].dtype for node in part.program.graph.output_node().all_input_nodes}
        assert dtypes == {torch.float32}


def test_a_skip_that_many_parts_read_is_handed_on() -> None:
    class Skips(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = y = self.layers[0](x)
            for layer in list(self.layers)[1:]:
                y = layer(y) + first
            return y

    torch.manual_seed(0)
    program = torch.export.export(Skips().eval(), (torch.randn(1, 4),))
    parts = cut(program, 4, ["prediction"])
    given = inputs_of(program)
    assert torch.equal(run(parts, given), evaluate(program, given)[0])


def test_more_parts_than_places_is_refused() -> None:
    program = torch.export.export(torch.nn.Linear(4, 4).eval(), (torch.randn(1, 4),))
    with pytest.raises(EdgegenError, match="cannot be cut into 3 parts"):
        cut(program, 3, ["y"])


def test_footprint_of_a_chain_is_two_values() -> None:
    class Chain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                x = (x.view(2, 8) + 1).view(4, 4)
            return x

    program = torch.export.export(Chain(), (torch.zeros(4, 4),))
    found = footprint(program)
    assert (found.weights, found.activations) == (0, 2 * 16 * 4)


def test_footprint_keeps_a_skip_alive(unet: ExportedProgram) -> None:
    found = footprint(unet)
    assert found.weights == weight_bytes(unet) == sum(t.numel() * 4 for t in unet.state_dict.values())
    values = [node.meta.get("val") for node in unet.graph.nodes if node.op == "call_function"]
    largest = max(4 * value.numel() for value in values if isinstance(value, torch.Tensor))
    assert found.activations >= 2 * largest
    assert found.at
