"""Adapters change weights by scale * alpha / rank * up @ down, whoever wrote their names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from edgegen.cli.main import main
from edgegen.errors import EdgegenError, UnsafeError, UsageError
from edgegen.students.config import ComponentConfig, LatentConfig, StudentConfig
from edgegen.students.load import load
from edgegen.students.low_rank import Adapter, parse_adapter, with_adapters
from edgegen.students.low_rank_names import INNER, in_diffusers_words
from edgegen.students.networks.clip_pair import ClipPair, ClipPairConfig
from edgegen.students.networks.unet import UNet, UNetConfig
from edgegen.students.sampler import SamplerConfig
from edgegen.students.student import Component, Student

TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
PROJ = "down_blocks.1.attentions.0.proj_in"
TEXT_ONE = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
TEXT_TWO = "text_encoder_2.text_model.encoder.layers.1.mlp.fc1"
RANK = 3


def text_config(layers):
    return {
        "vocab_size": 20,
        "max_position_embeddings": 6,
        "hidden_size": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }


@pytest.fixture
def student():
    torch.manual_seed(0)
    unet = UNet(
        UNetConfig(
            sample_size=8,
            block_out_channels=(16, 32),
            cross_attention=(False, True),
            num_heads=2,
            cross_attention_dim=16,
            norm_num_groups=8,
        )
    )
    pair = ClipPair(
        ClipPairConfig.model_validate(
            {"first": {"text": text_config(3)}, "second": {"text": text_config(2), "projection_dim": 4}}
        )
    )
    modules = {"text_encoder": pair, "denoiser": unet}
    parts = {name: Component(name, module.eval().requires_grad_(False), (), ()) for name, module in modules.items()}
    described = {name: ComponentConfig(architecture="unet", config={}, inputs=(), outputs=()) for name in parts}
    sampler = SamplerConfig(scheduler="ddim", prediction_type="epsilon", times={1: (999,)}, default_steps=1)
    config = StudentConfig(
        name="small",
        task="text-to-image",
        components=described,
        sampler=sampler,
        latent=LatentConfig(shape=(1, 4, 8, 8)),
    )
    return Student(config, parts, None)


def weights(student):
    return {
        f"{name}/{key}": value.clone()
        for name, part in student.components.items()
        for key, value in part.module.state_dict().items()
    }


def factors(weight, seed):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], RANK, *(1,) * (weight.ndim - 2), generator=generator)
    return down, up


FORMS = {
    "diffusers": lambda module, prefix: (f"{prefix}.{module}.lora_A.weight", f"{prefix}.{module}.lora_B.weight", None),
    "old diffusers": lambda module, prefix: (
        f"{prefix}.{module.removesuffix('.0')}.lora.down.weight",
        f"{prefix}.{module.removesuffix('.0')}.lora.up.weight",
        f"{prefix}.{module.removesuffix('.0')}.alpha",
    ),
    "kohya": lambda module, prefix: tuple(
        f"{ {'unet': 'lora_unet_', 'text_encoder': 'lora_te1_', 'text_encoder_2': 'lora_te2_'}[prefix] }"
        f"{module.replace('.', '_')}.{end}"
        for end in ("lora_down.weight", "lora_up.weight", "alpha")
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_is_the_same_sum(student, tmp_path, form):
    before, tensors, wanted = weights(student), {}, {}
    places = [("unet", one, f"denoiser/{one}.weight") for one in (TO_Q, TO_OUT, CONV, PROJ)]
    for text in (TEXT_ONE, TEXT_TWO):
        prefix, _, module = text.partition(".")
        places.append((prefix, module, f"text_encoder/{text}.weight"))
    for seed, (prefix, module, key) in enumerate(places):
        down, up = factors(before[key], seed)
        names = FORMS[form](module, prefix)
        tensors[names[0]], tensors[names[1]] = down, up
        alpha = RANK
        if names[2] is not None:
            alpha = 2.0
            tensors[names[2]] = torch.tensor(alpha)
        wanted[key] = before[key] + 0.5 * alpha / RANK * (up.flatten(1) @ down.flatten(1)).reshape(before[key].shape)
    save_file(tensors, tmp_path / "adapter.safetensors")
    fingerprint = student.fingerprint
    made = with_adapters(student, [Adapter(tmp_path / "adapter.safetensors", 0.5)])
    after = weights(made)
    for key, value in before.items():
        torch.testing.assert_close(after[key], wanted.get(key, value), atol=1e-6, rtol=1e-6)
    assert made.fingerprint != fingerprint


def test_the_alpha_of_newer_files_is_in_their_metadata(student, tmp_path):
    key = f"denoiser/{TO_Q}.weight"
    before = weights(student)[key]
    down, up = factors(before, 0)
    tensors = {f"unet.{TO_Q}.lora_A.weight": down, f"unet.{TO_Q}.lora_B.weight": up}
    said = {"unet.lora_alpha": 6, "unet.r": RANK, "unet.alpha_pattern": {}}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(said)})
    found = weights(with_adapters(student, [Adapter(tmp_path / "a.safetensors")]))[key]
    torch.testing.assert_close(found, before + 2.0 * up @ down)


def test_a_layer_that_the_student_does_without_is_passed_over_and_a_stranger_is_not(student, tmp_path):
    down, up = torch.ones(RANK, 8), torch.ones(8, RANK)
    left_out = "lora_te1_text_model_encoder_layers_2_self_attn_q_proj"
    q = "lora_unet_" + TO_Q.replace(".", "_")
    tensors = {f"{left_out}.lora_down.weight": down, f"{left_out}.lora_up.weight": up}
    own = {f"{q}.lora_down.weight": torch.ones(RANK, 32), f"{q}.lora_up.weight": torch.ones(32, RANK)}
    save_file(tensors | own, tmp_path / "a.safetensors")
    with_adapters(student, [Adapter(tmp_path / "a.safetensors")])
    further = {key.replace("layers_2", "layers_3"): value for key, value in tensors.items()}
    save_file(further | own, tmp_path / "b.safetensors")
    with pytest.raises(EdgegenError, match=r"of the 2 modules .*layers_3.* is no weight"):
        with_adapters(student, [Adapter(tmp_path / "b.safetensors")])


def test_an_adapter_of_another_network_is_told_by_what_it_holds(student, tmp_path):
    names = [f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_{end}.weight" for i in range(3) for end in ("down", "up")]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(
        EdgegenError, match=r"of the 3 modules .* none is a weight .*double_blocks_0_img_attn"
    ) as caught:
        with_adapters(student, [Adapter(tmp_path / "a.safetensors")])
    assert "same network" in caught.value.hint


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"unet.mid_block.lora_A.weight": (3, 4)}, "mid_block"),
        ({f"unet.{TO_Q}.lora_magnitude_vector": (3,)}, "magnitude"),
        ({f"unet.{TO_Q}.lora_A.weight": (3, 32)}, "without the other"),
        ({f"unet.{TO_Q}.lora_A.weight": (3, 31), f"unet.{TO_Q}.lora_B.weight": (32, 3)}, "32, 32"),
        ({f"unet.{TO_Q}.hada_w1_a": (3, 4)}, "hada"),
    ],
)
def test_what_cannot_be_merged_is_named(student, tmp_path, tensors, said):
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "a.safetensors")
    before = weights(student)
    with pytest.raises(EdgegenError, match=said) as caught:
        with_adapters(student, [Adapter(tmp_path / "a.safetensors")])
    assert caught.value.hint
    assert all(torch.equal(value, before[key]) for key, value in weights(student).items())


def test_pickled_adapters_are_refused(student, tmp_path):
    torch.save({"unet": UNetConfig}, tmp_path / "a.pt")
    with pytest.raises((UnsafeError, EdgegenError)):
        with_adapters(student, [Adapter(tmp_path / "a.pt")])


def test_scales_of_the_command_line(tmp_path):
    (tmp_path / "a.safetensors").touch()
    assert parse_adapter("x/a.safetensors:0.8") == Adapter(parse_adapter("x/a.safetensors").path, 0.8)
    assert parse_adapter("a.safetensors:-1e-1").scale == -0.1
    for text in (f"{tmp_path}/a.safetensors:much", f"{tmp_path}/a.safetensors:1e999"):
        with pytest.raises(UsageError):
            parse_adapter(text)


def test_the_first_names_of_sdxl_are_read_as_diffusers_reads_them():
    """Names of kohya's files for SDXL, every layer once, against diffusers' own conversion."""
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    from types import SimpleNamespace

    written = ["middle_block_0_in_layers_2", "middle_block_1_proj_in", "middle_block_2_emb_layers_1"]
    for index in range(1, 9):
        if index % 3:
            written += [f"input_blocks_{index}_0_{end}" for end in ("in_layers_2", "out_layers_3", "skip_connection")]
            written += [f"input_blocks_{index}_1_{end}" for end in ("proj_in", "transformer_blocks_0_attn2_to_k")]
        elif index < 9:
            written.append(f"input_blocks_{index}_0_op")
    for index in range(9):
        written += [f"output_blocks_{index}_0_{end}" for end in ("in_layers_2", "out_layers_3")]
        written += [f"output_blocks_{index}_1_{end}" for end in ("proj_out", "transformer_blocks_1_ff_net_0_proj")]
    written += ["output_blocks_2_2_conv", "output_blocks_5_2_conv"]
    theirs = {f"lora_unet_{name}.lora_down.weight": name for name in written}
    found = conversion._maybe_map_sgm_blocks_to_diffusers(theirs, SimpleNamespace(layers_per_block=2))
    assert len(found) == len(written)
    for key, name in found.items():
        wanted = key.removeprefix("lora_unet_").removesuffix(".lora_down.weight")
        # What diffusers does next, once it makes modules of these names.
        for old, new in (
            ("input_blocks", "down_blocks"),
            ("output_blocks", "up_blocks"),
            ("middle_block", "mid_block"),
        ):
            wanted = wanted.replace(old, new)
        for old, new in (*INNER.items(), ("samplers_0_op", "samplers_0_conv")):
            wanted = wanted.removesuffix(old) + new if wanted.endswith(old) else wanted
        assert in_diffusers_words(name) == wanted
    assert in_diffusers_words("input_blocks_0_0") == "conv_in"


def test_an_adapter_with_the_first_names_is_merged(student, tmp_path):
    key = f"denoiser/{CONV}.weight"
    before = weights(student)[key]
    down, up = factors(before, 0)
    tensors = {"lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight": down}
    tensors["lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight"] = up
    save_file(tensors, tmp_path / "a.safetensors")
    found = weights(with_adapters(student, [Adapter(tmp_path / "a.safetensors")]))[key]
    torch.testing.assert_close(found, before + (up.flatten(1) @ down.flatten(1)).reshape(before.shape))


def test_the_option_merges_and_a_stranger_fails_the_command(shapes, tmp_path, capsys):
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = shapes.components["denoiser"].module.state_dict()[f"{module}.weight"]
    down, up = factors(weight, 0)
    save_file({f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}, tmp_path / "a.safetensors")
    assert main(["student", "pack", "--lora", f"{tmp_path}/a.safetensors:0.5", "-o", str(tmp_path / "m.pt")]) == 0
    found = load(tmp_path / "m.pt").components["denoiser"].module.state_dict()[f"{module}.weight"]
    torch.testing.assert_close(found, weight + 0.5 * up @ down)
    save_file({"unet.nowhere.lora_A.weight": down}, tmp_path / "b.safetensors")
    assert main(["inspect", str(tmp_path / "m.pt"), "--lora", f"{tmp_path}/b.safetensors"]) == 1
    assert "unet.nowhere" in capsys.readouterr().err
