"""SDXS at its exact sizes, against hand counts and against diffusers' and transformers' own networks."""

import pytest
import torch

from edgegen.graph.count import count
from edgegen.students.architectures import build_module
from edgegen.students.assembly import build_student
from edgegen.students.families.registry import FAMILIES, config_of, new, parameters
from edgegen.students.sample import draw
from edgegen.students.student import DTYPES

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PARAMETERS = {
    "sdxs-512": {"text_encoder": 123_060_480, "denoiser": 315_746_244, "decoder": 1_222_531},
    "sdxs-512-0.9": {"text_encoder": 340_387_840, "denoiser": 328_177_284, "decoder": 1_222_531},
    "sdxs-1024": {"text_encoder": 810_630_912, "denoiser": 738_585_924, "decoder": 1_222_531},
}
DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
THEIRS = {
    "sdxs-512": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", DOWN, DOWN),
        "up_block_types": (UP, UP, "UpBlock2D"),
        "mid_block_type": None,
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sdxs-512-0.9": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": (DOWN, DOWN, DOWN),
        "up_block_types": (UP, UP, UP),
        "mid_block_type": None,
        "layers_per_block": 1,
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 1024,
        "only_cross_attention": (True, False, False),
        "use_linear_projection": True,
    },
}
SMALL = {
    "sdxs-512": {
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", DOWN),
        "up_block_types": (UP, "UpBlock2D"),
    },
    "sdxs-512-0.9": {
        "attention_head_dim": (1, 2),
        "down_block_types": (DOWN, DOWN),
        "up_block_types": (UP, UP),
        "only_cross_attention": (True, False),
    },
}


def meta(part):
    with torch.device("meta"):
        return build_module(part.architecture, part.config)


def captured(config, name):
    part = config.components[name]
    inputs = tuple(torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta") for spec in part.inputs)
    with torch.no_grad():
        return torch.export.export(meta(part), inputs)


def unet_by_hand(widths, context, attention):
    """Weights and biases of a UNet without a middle, one residual block a level, one transformer where it has them."""

    def conv(i, o, k):
        return i * o * k * k + o

    def resnet(i, o):
        time, shortcut = 4 * widths[0] * o + o, conv(i, o, 1) if i != o else 0
        return 2 * i + conv(i, o, 3) + time + 2 * o + conv(o, o, 3) + shortcut

    def transformer(c):
        attend = 3 * c * c + (c * c + c) + c * c + 2 * context * c + (c * c + c)
        feed = c * 8 * c + 8 * c + 4 * c * c + c
        return 2 * c + 2 * conv(c, c, 1) + 3 * 2 * c + attend + feed

    first, time = widths[0], 4 * widths[0]
    total = conv(4, first, 3) + (first * time + time) + (time * time + time) + 2 * first + conv(first, 4, 3)
    skips, channels = [first], first
    for level, width in enumerate(widths):
        total += resnet(channels, width) + attention[level] * transformer(width)
        skips.append(width)
        if level < len(widths) - 1:
            total += conv(width, width, 3)
            skips.append(width)
        channels = width
    for level in reversed(range(len(widths))):
        width = widths[level]
        for _ in range(2):
            total += resnet(channels + skips.pop(), width) + attention[level] * transformer(width)
            channels = width
        total += conv(width, width, 3) if level else 0
    return total


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_component_has_its_published_size(name):
    assert parameters(config_of(name, "full")) == PARAMETERS[name]


def test_the_dreamshaper_unet_against_a_hand_count():
    assert unet_by_hand((320, 640, 1280), 768, (False, True, True)) == PARAMETERS["sdxs-512"]["denoiser"]


@pytest.mark.parametrize("name", THEIRS)
def test_every_key_and_shape_of_the_full_unet_is_diffusers_own(name):
    ours = meta(config_of(name, "full").components["denoiser"]).state_dict()
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**THEIRS[name]).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_taesds_macs_by_hand():
    """64 channels 3x3 everywhere: 9 convolutions and the two ends at each side, 3 more after every doubling."""
    wide, sides = 9 * 64 * 64, (64, 128, 256, 512)
    blocks = sum(side**2 * wide * count for side, count in zip(sides, (9, 9, 9, 3), strict=True))
    ups = sum(side**2 * wide for side in sides[1:])
    ends = sides[0] ** 2 * 9 * 4 * 64 + sides[-1] ** 2 * 9 * 64 * 3
    found = count(captured(config_of("sdxs-512", "full"), "decoder"))
    assert found.macs == blocks + ups + ends == 70_675_070_976
    assert not found.uncounted


@pytest.mark.parametrize(("name", "macs"), [("sdxs-512", 184_657_346_560), ("sdxs-512-0.9", 209_047_552_000)])
def test_macs_of_the_full_unet(name, macs):
    found = count(captured(config_of(name, "full"), "denoiser"))
    assert (found.parameters, found.macs) == (PARAMETERS[name]["denoiser"], macs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_one_step_with_the_coefficients_of_the_public_runtime(name):
    (step,) = config_of(name, "full").sampler.table(1)
    assert step.timestep == 999.0
    assert step.sample == pytest.approx(14.642586, abs=2e-6)
    assert step.prediction == pytest.approx(-14.579274, abs=2e-6)
    assert step.noise == 0.0


@pytest.fixture(scope="module")
def tiny():
    return {name: new(name, "tiny", seed=3) for name in PARAMETERS}


def pipeline(name, student):
    """diffusers' and transformers' own networks at the tiny size, with weights of their own."""
    part = student.components["text_encoder"].module
    torch.manual_seed(5)
    two = hasattr(part, "text_encoder_2")
    halves = [part.text_encoder, part.text_encoder_2] if two else [part]
    made = {}
    for index, (half, kind) in enumerate(zip(halves, ("CLIPTextModel", "CLIPTextModelWithProjection"), strict=False)):
        config = half.config if not two else half.reads.text
        settings = config.model_dump() | {"projection_dim": 24, "eos_token_id": 49407}
        network = getattr(transformers, kind)(transformers.CLIPTextConfig(**settings)).eval()
        made["text_encoder" if index == 0 else "text_encoder_2"] = network
    if name in THEIRS:
        settings = THEIRS[name] | SMALL[name]
        settings |= {"sample_size": 8, "block_out_channels": (16, 32), "cross_attention_dim": 32}
        made["unet"] = diffusers.UNet2DConditionModel(**settings, norm_num_groups=8).eval()
    else:
        config = student.config.components["denoiser"].config["unet"]
        made["unet"] = diffusers.UNet2DConditionModel(**config).eval()
    made["vae"] = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4,
        decoder_block_out_channels=(16,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).eval()
    return made


@torch.no_grad()
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_pipelines_own_weights_load_by_their_names_and_give_its_numbers(name, tiny):
    student = tiny[name]
    theirs = pipeline(name, student)
    flat = {f"{folder}.{key}": value for folder, part in theirs.items() for key, value in part.state_dict().items()}
    state = FAMILIES[name].from_upstream(flat)
    loaded = build_student(student.config, state, student.tokenizer_json, name)
    ids = student.tokenize(["a red house by the sea", "a cat"])
    out = loaded.components["text_encoder"].module(ids)
    if name == "sdxs-1024":
        context, pooled = out
        at = (ids == 49407).int().argmax(dim=1)
        second = torch.where(torch.arange(ids.shape[1]) > at[:, None], 0, ids)
        one = theirs["text_encoder"](ids, output_hidden_states=True).hidden_states[-2]
        two = theirs["text_encoder_2"](second, output_hidden_states=True)
        torch.testing.assert_close(context, torch.cat([one, two.hidden_states[-2]], dim=-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(pooled, two.text_embeds, atol=1e-5, rtol=0)
        sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        rest = (context, pooled)
    else:
        context, more, rest = out, {}, (out,)
        torch.testing.assert_close(context, theirs["text_encoder"](ids)[0], atol=1e-5, rtol=0)
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for timestep in (999.0, 250.0):
        moment = torch.full((2,), timestep)
        wanted = theirs["unet"](latent, moment, context, **more).sample
        assert wanted.std() > 0.05
        found = loaded.components["denoiser"].module(latent, moment, *rest)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    picture = loaded.components["decoder"].module(latent)
    torch.testing.assert_close(picture, theirs["vae"].decode(latent).sample, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_first_level_of_0_9_reads_the_text_where_others_read_the_picture(tiny):
    block = tiny["sdxs-512-0.9"].components["denoiser"].module.down_blocks[0].attentions[0].transformer_blocks[0]
    x, context = torch.randn(1, 5, 16), torch.randn(1, 3, 32)
    alone = torch.cat([block(x[:, i : i + 1], context) for i in range(5)], dim=1)
    torch.testing.assert_close(block(x, context), alone)


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_untrained_student_draws_something_else_for_another_prompt(name, tiny):
    one, other = draw(tiny[name], ["a red house by the sea", "a cat"], [1, 1], 1)
    assert one.shape == (3, 64, 64)
    assert one.std() > 0.02 and (one - other).std() > 0.02 * one.std()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxs-512-0.9", "sdxs-1024"])
def test_onnxruntime_computes_what_torch_does(name, tiny, onnxruntime_quality):
    assert onnxruntime_quality(tiny[name], "denoiser") >= 100
