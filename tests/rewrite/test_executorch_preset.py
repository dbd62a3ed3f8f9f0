"""The ExecuTorch preset on a small UNet: the ops that XNNPACK does not delegate are gone, the numbers stay."""

import pytest
import torch

from edgegen.graph.evaluate import evaluate
from edgegen.rewrite.base import census
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.presets import canonical, executorch
from edgegen.students.networks.clip_text import ClipTextConfig, ClipTextEncoder
from edgegen.students.networks.unet import UNet, UNetConfig
from edgegen.verify.metrics import sqnr_db

UNDELEGATED = (
    "group_norm",
    "layer_norm",
    "scaled_dot_product_attention",
    "chunk",
    "split_with_sizes",
    "upsample_nearest2d",
    "expand",
    "where",
)


def unet():
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(16, 32),
        cross_attention=(False, True),
        num_heads=2,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    given = {"latent": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([999.0]), "context": torch.randn(1, 6, 32)}
    return UNet(config), given, (999.0,)


def text_encoder():
    config = ClipTextConfig(
        vocab_size=9,
        max_position_embeddings=6,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=16,
    )
    return ClipTextEncoder(config), {"input_ids": torch.randint(0, 9, (1, 6))}, ()


@pytest.mark.parametrize("build", [unet, text_encoder])
def test_nothing_is_left_that_cuts_a_delegate(build):
    torch.manual_seed(0)
    module, given, timesteps = build()
    with torch.no_grad():
        program = torch.export.export(module.eval(), tuple(given.values()))
        expected = module(*given.values()).numpy()
    rewritten, records = Pipeline((*canonical.passes(timesteps), *executorch.passes())).run(program)
    assert not {f"aten.{name}" for name in UNDELEGATED} & set(census(rewritten))
    assert not [
        one for record in records for one in record.declined if not record.modified and "fold" not in record.spec
    ]
    (found,) = evaluate(rewritten, given)
    assert sqnr_db(expected, found.numpy()) >= 100
