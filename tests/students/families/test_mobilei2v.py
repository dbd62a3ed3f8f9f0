"""MobileI2V: published counts, MACs, upstream names, and all three networks on every runtime."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgegen.graph.capture import signature
from edgegen.graph.count import count
from edgegen.graph.evaluate import evaluate
from edgegen.lower.backend import LowerRequest, get_backend
from edgegen.rewrite.choose import canonical_preset, shape_preset
from edgegen.rewrite.half_safety import make_half_safe
from edgegen.rewrite.pipeline import Pipeline
from edgegen.students.architectures import build_module
from edgegen.students.families.mobilei2v import MOBILEI2V, from_upstream, full, tiny
from edgegen.students.families.registry import new, parameters
from edgegen.students.student import Component

PUBLISHED = 267_218_048
"""`Mobiledit_300M_P1_D16`: 267.2 M, as its paper has it (0.27 B)."""
CAPTION = 896 * 1152 + 1152 + 1152 * 1152 + 1152 + 1152
"""Two layers from Qwen2's 896 channels and a norm, which nothing reads."""


def test_parameters_of_the_full_size():
    counts = parameters(full())
    assert counts["denoiser"] == PUBLISHED - CAPTION == 264_855_296
    assert counts["decoder"] == 41_896_023
    # A third of the video encoder's kernels, and one channel of variance less, of its 180,404,353.
    assert counts["image_encoder"] == 60_250_752


def test_the_decoder_is_the_published_share_of_ltx():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        decoder = diffusers.AutoencoderKLLTXVideo().decoder
    share = parameters(full())["decoder"] / sum(one.numel() for one in decoder.parameters())
    assert round(100 * share, 1) == 17.5


@pytest.fixture(scope="module")
def full_macs():
    made = {}
    for name, part in full().components.items():
        with torch.device("meta"):
            module = build_module(part.architecture, part.config)
            program = torch.export.export(module, tuple(torch.empty(spec.shape) for spec in part.inputs))
        outputs = list(program.graph.nodes)[-1].args[0]
        assert tuple(outputs[0].meta["val"].shape) == part.outputs[0].shape
        found = count(program)
        assert not found.uncounted
        made[name] = found.macs
    return made


def test_macs_of_the_denoiser(full_macs):
    tokens, dim, hidden = 2760, 1152, 2880
    block = tokens * (4 * dim * dim + 2 * hidden * dim + 2 * hidden * 9 + hidden * dim)
    linear = 16 * 73 * 72 * tokens * 2
    softmax = 2 * tokens * tokens * dim
    ends = tokens * 2 * 128 * dim
    embedded = 256 * dim + dim * dim + 6 * dim * dim
    assert full_macs["denoiser"] == 16 * block + 14 * linear + 2 * softmax + ends + (3 + 1) * embedded


def test_macs_of_encoder_and_decoder(full_macs):
    """The decoder by hand: channels, frames and places of every level."""

    def conv(inner, outer, taps, frames, places):
        return inner * outer * taps * frames * places

    def separable(channels, outer, taps, frames, places):
        return conv(channels, 1, taps, frames, places) + conv(channels, outer, 1, frames, places)

    places = 23 * 40
    macs = conv(128, 512, 27, 3, places)
    macs += 4 * separable(512, 512, 125, 3, places)  # mid and first level, one block of two convolutions each
    frames, width = 3, 512
    for outer, blocks in ((256, 3), (128, 2), (64, 3)):
        macs += conv(width, outer, 27, frames, places) + conv(outer, outer, 27, frames, places)
        macs += conv(width, outer, 1, frames, places)
        macs += conv(outer, 8 * outer, 27, frames, places)
        frames, places, width = 2 * frames - 1, 4 * places, outer
        macs += 2 * blocks * conv(outer, outer, 27, frames, places)
    macs += conv(64, 64, 9, 17, places) + conv(16, 16, 9, 17, 4 * places) + conv(4, 3, 27, 17, 16 * places)
    assert full_macs["decoder"] == macs
    assert full_macs["image_encoder"] == 236_826_132_480


def upstream_denoiser(config):
    """Names as the public code's `state_dict` has them, the dead ones among them."""
    names = ["x_embedder.proj.weight", "x_embedder.proj.bias", "pos_embed", "pos_embed_temporal"]
    names += ["attention_y_norm.weight", "y_embedder.y_embedding"]
    names += [f"y_embedder.y_proj.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")]
    for of in ("t", "flow"):
        names += [f"{of}_embedder.mlp.{place}.{kind}" for place in (0, 2) for kind in ("weight", "bias")]
        names += [f"{of}_block.1.weight", f"{of}_block.1.bias"]
    for index, kind in enumerate(config["blocks"]):
        inside = ["scale_shift_table", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"]
        inside += ["attn.q_norm.weight", "attn.k_norm.weight"] if kind == "linear" else ["attn.qkv.bias"]
        for layer in ("inverted_conv", "depth_conv"):
            inside += [f"mlp.{layer}.conv.weight", f"mlp.{layer}.conv.bias"]
        names += [f"blocks.{index}.{name}" for name in (*inside, "mlp.point_conv.conv.weight")]
    return [*names, "final_layer.linear.weight", "final_layer.linear.bias", "final_layer.scale_shift_table"]


def upstream_decoder():
    """Names of Turbo-VAED's own state dict at its LTX configuration."""
    names = ["upsampler2d_1.conv", "upsampler2d_2.conv", "conv_in.conv", "conv_out.conv"]

    def resnet(path, separable):
        kinds = ("depthwise_conv", "pointwise_conv") if separable else ("conv",)
        return [f"{path}.{conv}.{kind}" for conv in ("conv1", "conv2") for kind in kinds]

    names += resnet("mid_block.resnets.0", True) + resnet("up_blocks.0.resnets.0", True)
    for level, blocks in ((1, 3), (2, 2), (3, 3)):
        path = f"up_blocks.{level}"
        names += [*resnet(f"{path}.conv_in", False), f"{path}.conv_in.norm3", f"{path}.conv_in.conv_shortcut.conv"]
        names += [f"{path}.upsamplers.0.conv"]
        names += [name for block in range(blocks) for name in resnet(f"{path}.resnets.{block}", False)]
    names = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    return [*names, "norm_out.running_mean", "norm_out.running_var", "norm_out.num_batches_tracked"]


def test_a_state_dict_with_upstream_names_loads():
    config = full()
    with torch.device("meta"):
        modules = {name: build_module(part.architecture, part.config) for name, part in config.components.items()}
        names = upstream_denoiser(config.components["denoiser"].config)
        state = {f"denoiser.{name}": modules["denoiser"].state_dict().get(name, torch.empty(1)) for name in names}
        own = modules["decoder"].state_dict()
        state |= {f"decoder.{name}": own.get(name, torch.empty(1)) for name in upstream_decoder()}
        encoder = pytest.importorskip("diffusers").AutoencoderKLLTXVideo().encoder
        state |= {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
        state |= {"latents_mean": torch.empty(128), "aligned_feature_projection_heads.0.0.conv.weight": torch.empty(1)}
    for name, part in from_upstream(state).items():
        modules[name].load_state_dict(part, strict=True)


@pytest.fixture(scope="module")
def parts():
    """The tiny student's denoiser, and its coders cut to two levels: one that scales and one that does not."""
    components = dict(new(MOBILEI2V.name, "tiny").components)
    levels = {"layers_per_block": (1, 1, 1), "spatio_temporal_scaling": (True, False), "latent_channels": 16}
    coders = {
        "image_encoder": ("video_encoder", {"block_out_channels": (16, 32)}, (1, 3, 36, 48), (1, 16, 1, 5, 6)),
        "decoder": (
            "video_decoder",
            {"block_out_channels": (16, 32), "is_dw_conv": (False, False, True), "crop": (30, 48)},
            (1, 16, 3, 4, 6),
            (1, 3, 5, 30, 48),
        ),
    }
    torch.manual_seed(0)
    for name, (architecture, config, taken, given) in coders.items():
        whole = components[name]
        inputs = (whole.inputs[0].model_copy(update={"shape": taken}),)
        outputs = (whole.outputs[0].model_copy(update={"shape": given}),)
        components[name] = Component(name, build_module(architecture, levels | config), inputs, outputs)
    return components


@pytest.fixture(scope="module")
def inputs(parts):
    generator = torch.Generator().manual_seed(1)
    made = {
        name: {spec.name: torch.randn(spec.shape, generator=generator) for spec in part.inputs}
        for name, part in parts.items()
    }
    made["denoiser"] |= {"timestep": torch.tensor([500.0]), "flow_score": torch.tensor([2.0])}
    return made


@pytest.fixture(scope="module")
def canonical(parts, inputs):
    """(graph after the passes that all targets share, its inputs, what the module gives), by component."""
    made = {}
    for name, part in parts.items():
        program = torch.export.export(part.module, tuple(inputs[name][spec.name] for spec in part.inputs))
        program, _ = Pipeline(canonical_preset(name, (1000.0, 500.0))).run(program)
        given = {spec.name: inputs[name].get(spec.name) for spec in signature(program)}
        if "step" in given:
            given["step"] = torch.tensor([1], dtype=torch.int32)
        made[name] = program, given, part.module(**inputs[name]).numpy()
    return made


def sqnr(expected, found):
    noise = np.square(expected.astype(np.float64) - found).sum()
    return 10 * np.log10(np.square(expected).sum() / max(noise, 1e-30))


def run(backend, program, part, given, precision, folder, islands=()):
    backend = get_backend(backend)
    specs = signature(program)
    request = LowerRequest(part.name, specs, part.outputs, precision, folder, islands=islands)
    lowered = backend.lower(program, request)
    executable = backend.load(folder / lowered.file, specs, part.outputs)
    (found,) = executable({name: value.numpy() for name, value in given.items()}).values()
    executable.close()
    return lowered.delegation, found


CASES = [
    (backend, component)
    for backend in ("onnx", "tflite", "executorch", "coreml")
    for component in ("image_encoder", "denoiser", "decoder")
    if backend != "coreml" or component == "denoiser"  # the others are converted in float16 below
]
MODULES = {"tflite": "litert_torch", "coreml": "coremltools"}


@pytest.mark.parametrize(("backend", "component"), CASES)
def test_lowered_in_one_piece_with_the_same_numbers(parts, canonical, backend, component, tmp_path):
    pytest.importorskip(MODULES.get(backend, backend))
    program, given, expected = canonical[component]
    program, _ = Pipeline(shape_preset(backend)).run(program)
    delegation, found = run(backend, program, parts[component], given, "fp32", tmp_path)
    assert sqnr(expected, found) > 110
    if delegation.known:
        # The row of the step's constants is looked up outside of either delegate, and cuts nothing.
        assert delegation.pieces == 1
        assert set(delegation.undelegated) <= {"EMBEDDING_LOOKUP", "aten.embedding.default"}


@pytest.mark.parametrize("component", ["image_encoder", "denoiser", "decoder"])
def test_coreml_in_float16(parts, canonical, component, tmp_path):
    pytest.importorskip("coremltools")
    program, given, expected = canonical[component]
    program, _ = Pipeline(shape_preset("coreml")).run(program)
    safe = make_half_safe(program, [given])
    program, _ = Pipeline(safe.rewrites).run(program)
    _, found = run("coreml", program, parts[component], given, "fp16", tmp_path, safe.to_half.islands)
    assert sqnr(expected, found) > 50


def test_sums_over_tokens_beyond_float16_are_scaled_into_it(parts, inputs, tmp_path):
    """Values whose sum over 72 tokens overflows; 2760 tokens do so much sooner."""
    pytest.importorskip("coremltools")
    config = tiny().components["denoiser"].config | {"blocks": ("linear",)}
    torch.manual_seed(0)
    part = replace(parts["denoiser"], module=build_module("mobile_dit", config))
    with torch.no_grad():
        attention = part.module.blocks[0].attn
        attention.qkv.weight[192:] *= 8000
        attention.proj.weight /= 8000
        expected = part.module(**inputs["denoiser"]).numpy()
    program = torch.export.export(part.module, tuple(inputs["denoiser"][spec.name] for spec in part.inputs))
    program, _ = Pipeline((*canonical_preset("denoiser", (500.0,)), *shape_preset("coreml"))).run(program)
    given = {spec.name: inputs["denoiser"][spec.name] for spec in signature(program)}
    (tmp_path / "plain").mkdir()
    _, broken = run("coreml", program, part, given, "fp16", tmp_path / "plain")
    assert not np.isfinite(broken).all(), "nothing overflows: the test proves nothing"
    safe = make_half_safe(program, [given])
    program, _ = Pipeline(safe.rewrites).run(program)
    _, found = run("coreml", program, part, given, "fp16", tmp_path, safe.to_half.islands)
    assert sqnr(expected, found) > 50


def test_graphs_are_those_of_the_modules(canonical):
    for program, given, expected in canonical.values():
        (found,) = evaluate(program, given)
        assert sqnr(expected, found.numpy()) > 110
