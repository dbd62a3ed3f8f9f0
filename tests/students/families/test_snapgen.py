"""SnapGen: sizes against the paper's, the UNet against diffusers' `DreamLiteUNetModel`, and what the paper asks for."""

import pytest
import torch

from edgegen.students.architectures import build_module
from edgegen.students.families.registry import FAMILIES, config_of, new, parameters
from edgegen.students.networks.rotary import rotary_tables, rotate
from edgegen.students.networks.snapgen_unet import SnapGenUNet, SnapGenUNetConfig
from edgegen.students.sample import draw

diffusers = pytest.importorskip("diffusers")

SMALL = SnapGenUNetConfig(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32, 64),
    num_heads=(2, 4, 4),
    cross_attention_dim=24,
    norm_num_groups=8,
    rotary=False,
)


def theirs(config):
    return diffusers.DreamLiteUNetModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        transformer_layers_per_block=config.down_transformer_layers,
        attention_head_dim=config.num_heads,
        cross_attention_dim=config.cross_attention_dim,
        norm_num_groups=config.norm_num_groups,
        ff_mult=config.ff_ratio,
        use_linear_projection=True,
    )


@pytest.fixture(scope="module")
def tiny():
    return new("snapgen", "tiny", seed=3)


def test_sizes_beside_the_papers():
    found = parameters(config_of("snapgen", "full"))
    assert found == {"text_encoder": 810_630_912, "denoiser": 383_725_584, "decoder": 1_361_859}
    assert found["denoiser"] == pytest.approx(379e6, rel=0.015)
    assert found["decoder"] == pytest.approx(1.38e6, rel=0.015)


def test_macs_at_1024_pixels(full_size_macs):
    config = config_of("snapgen", "full")
    assert full_size_macs(config, "denoiser") == 659_122_683_904
    assert full_size_macs(config, "decoder") == 117_490_843_648


def test_every_key_and_shape_of_the_full_unet_is_diffusers_own():
    part = config_of("snapgen", "full").components["denoiser"]
    with torch.device("meta"):
        ours = build_module(part.architecture, part.config).state_dict()
        wanted = theirs(SnapGenUNetConfig(**part.config)).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in wanted.items()}


@torch.no_grad()
def test_without_rotary_positions_it_is_dreamlites_unet():
    torch.manual_seed(0)
    other = theirs(SMALL).eval()
    flat = {f"unet.{key}": value for key, value in other.state_dict().items()}
    ours = SnapGenUNet(SMALL).eval()
    ours.load_state_dict(FAMILIES["snapgen"].from_upstream(flat)["denoiser"])
    latent, context = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 24)
    moment = torch.tensor([900.0, 100.0])
    wanted = other(latent, moment, context).sample
    assert wanted.std() > 0.05
    torch.testing.assert_close(ours(latent, moment, context), wanted, atol=1e-5, rtol=0)
    turned = SnapGenUNet(SMALL.model_copy(update={"rotary": True})).eval()
    turned.load_state_dict(ours.state_dict())
    assert (turned(latent, moment, context) - wanted).abs().max() > 1e-4


def test_rotary_scores_depend_on_the_distance_alone():
    cosines, sines = rotary_tables(4, 6, 8)
    q, k = torch.randn(8), torch.randn(8)
    turned_q = rotate(q.expand(1, 1, 24, 8), cosines, sines)[0, 0].reshape(4, 6, 8)
    turned_k = rotate(k.expand(1, 1, 24, 8), cosines, sines)[0, 0].reshape(4, 6, 8)
    here, there = turned_q[0, 1] @ turned_k[2, 2], turned_q[1, 4] @ turned_k[3, 5]
    torch.testing.assert_close(here, there)
    assert (here - turned_q[0, 1] @ turned_k[2, 3]).abs() > 1e-4
    assert (here - turned_q[0, 1] @ turned_k[1, 2]).abs() > 1e-4


def test_self_attention_and_shared_keys_are_where_the_paper_has_them(tiny):
    names = dict(tiny.components["denoiser"].module.named_modules())
    with_self = {name.split("transformer_blocks")[0] for name in names if name.endswith("attn1")}
    assert {name.split(".attentions")[0] for name in with_self} == {"down_blocks.1", "mid_block", "up_blocks.0"}
    assert {part.out_features for name, part in names.items() if name.endswith("attn1.to_k")} == {32 // 4}
    assert not any(isinstance(part, torch.nn.MultiheadAttention) for part in names.values())
    decoder = [name for name, _ in tiny.components["decoder"].module.named_modules()]
    assert not any("attn" in name for name in decoder)


def test_few_steps_fall_from_noise_to_the_picture():
    sampler = config_of("snapgen", "full").sampler
    assert sampler.times[4] == pytest.approx((1.0, 0.9, 0.75, 0.5))
    assert sum(step.prediction for step in sampler.table(8)) == pytest.approx(-1.0)


def test_an_untrained_student_draws_something_else_for_another_prompt(tiny):
    one, other = draw(tiny, ["a red house by the sea", "a cat"], [1, 1], 4)
    assert one.shape == (3, 64, 64)
    assert one.std() > 0.02 and (one - other).std() > 0.02 * one.std()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text_encoder", "denoiser", "decoder"])
def test_onnxruntime_computes_what_torch_does(name, tiny, onnxruntime_quality):
    assert onnxruntime_quality(tiny, name) >= 100
