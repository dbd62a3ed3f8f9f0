"""What families have in common whose networks are diffusers' own classes: decoders, language models, the flow between.

A checkpoint of one is a folder, which `edgegen.students.diffusers_folder` reads: key names are upstream's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.config import LatentConfig, StudentConfig
from edgegen.students.families.text_to_image import PROMPTS, Network
from edgegen.students.networks.diffusers_decoder import DiffusersDecoderConfig
from edgegen.students.networks.transformers_text import TransformersTextConfig
from edgegen.students.schedulers import FlowSpacing, sampler_from

Shapes = Mapping[str, tuple[int, ...]]

TINY_SIDE = 8
MASKED_TEXT = ("context", "mask")


def few_step(
    name: str,
    text: BaseModel,
    read: Shapes,
    length: int,
    denoiser: BaseModel,
    taken: tuple[str, ...],
    decoder: DiffusersDecoderConfig,
    latent: LatentConfig,
    factor: int,
    scheduler: Mapping[str, Any],
    spacing: FlowSpacing | None = None,
    default_steps: int | None = None,
) -> StudentConfig:
    """A text-to-image student: `read` is what the text encoder gives, `taken` what of it the denoiser takes, and one
    place of the latent is `factor` pixels a side."""

    def specs(shapes: Shapes) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=key, shape=shape) for key, shape in shapes.items())

    sampler = sampler_from(scheduler, name, spacing)
    if default_steps is not None:
        sampler = sampler.model_copy(update={"default_steps": default_steps})
    noisy, pixels = {"latent": latent.shape}, tuple(factor * side for side in latent.shape[-2:])
    given = {**noisy, "timestep": (1,), **{key: read[key] for key in taken}}
    ids = (TensorSpec(name="input_ids", shape=(1, length), dtype="int32"),)
    return StudentConfig(
        name=name,
        task="text-to-image",
        components={
            "text_encoder": _network(text).component(ids, specs(read)),
            "denoiser": _network(denoiser).component(specs(given), specs({"prediction": latent.shape})),
            "decoder": _network(decoder).component(specs(noisy), specs({"image": (1, 3, *pixels)})),
        },
        sampler=sampler,
        latent=latent,
        example_prompts=PROMPTS,
    )


def _network(config: BaseModel) -> Network:
    from edgegen.students.architectures import ARCHITECTURES

    (name,) = (key for key, (kind, _) in ARCHITECTURES.items() if kind is type(config))
    return Network(architecture=name, config=config)


def kl_decoder(channels: int, *, quantized: bool = True, tiny: bool = False) -> DiffusersDecoderConfig:
    """Stable Diffusion's autoencoder, 8 pixels a place, or a tiny one of the same; 49.5 M parameters of decoder."""
    widths = (8, 16, 16, 16) if tiny else (128, 256, 512, 512)
    config = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1 if tiny else 2,
        "latent_channels": channels,
        "norm_num_groups": 4 if tiny else 32,
        "use_quant_conv": quantized,
        "use_post_quant_conv": quantized,
    }
    return DiffusersDecoderConfig(class_name="AutoencoderKL", autoencoder=config)


def language_model(class_name: Any, pad: int, config: Mapping[str, Any], layer: Any = "last") -> TransformersTextConfig:
    """A language model as text encoder; see `edgegen.students.networks.transformers_text`."""
    return TransformersTextConfig(class_name=class_name, encoder=dict(config), pad_token_id=pad, layer=layer)


def named(family: str, size: str) -> str:
    """A student's name: the family's, and the size where it is not the published one."""
    return family if size == "full" else f"{family}-{size}"
