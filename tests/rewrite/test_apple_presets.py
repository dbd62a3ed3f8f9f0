"""What the presets for Core ML and Core AI make of a small UNet."""

import pytest
import torch

from edgegen.graph.evaluate import evaluate
from edgegen.rewrite.base import census
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.presets import canonical, coreai, coreml
from edgegen.students.networks.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    cross_attention=(False, True),
    num_heads=2,
    cross_attention_dim=32,
    norm_num_groups=8,
)
BLOCKS = 3


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    return {"latent": torch.randn(1, 4, 8, 8), "context": torch.randn(1, 6, 32)}


@pytest.fixture(scope="module")
def program(inputs):
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval()
    captured = torch.export.export(unet, (inputs["latent"], torch.tensor([999.0]), inputs["context"]))
    return Pipeline(canonical.passes((999.0,))).run(captured)[0]


def shaped(preset, program, inputs):
    made, _ = Pipeline(preset.passes()).run(program)
    (before,), (after,) = evaluate(program, inputs), evaluate(made, inputs)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    return made, census(made)


def test_core_ml_gets_channels_first_on_four_axes(program, inputs):
    made, ops = shaped(coreml, program, inputs)
    # Once for the context, and the keys of each attention, which Core ML's product takes as a flag.
    assert ops["aten.transpose"] + ops["aten.permute"] == 1 + 2 * BLOCKS
    gone = ("linear", "layer_norm", "group_norm", "scaled_dot_product_attention", "chunk")
    assert [ops[f"aten.{name}"] for name in gone] == [0, 0, 0, 0, 0]
    values = [node.meta["val"] for node in made.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert max(value.dim() for value in values) <= 4


def test_core_ai_keeps_its_composites(program, inputs):
    _, ops = shaped(coreai, program, inputs)
    assert ops["aten.linear"] == 0
    for name in ("group_norm", "layer_norm", "scaled_dot_product_attention"):
        assert ops[f"aten.{name}"] == census(program)[f"aten.{name}"]
