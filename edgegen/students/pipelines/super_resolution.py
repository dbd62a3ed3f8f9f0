"""`LDMSuperResolutionPipeline`: a picture in, a larger one out, in as few steps as its scheduler is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegen.errors import EdgegenError
from edgegen.students.networks.super_resolution import ABSENT, halves
from edgegen.students.pipelines.decoder import STEM, Decoder, decoder
from edgegen.students.pipelines.files import SAVE_HINT, Part, config_of, require, require_depth, single, sizes, weights
from edgegen.students.sampler import SamplerConfig

PIPELINE = "LDMSuperResolutionPipeline"
CLASSES = {"unet": ("UNet2DModel",), "vqvae": ("VQModel",)}
PICTURE_CHANNELS = 3
BLOCKS = ("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")
"""Blocks that do not look at the picture again, as those with a `skip_conv` do."""


@dataclass(frozen=True)
class SuperResolution:
    """The three networks, the latent between them, and the side of the picture that is taken."""

    encoder: Part
    denoiser: Part
    vae: Decoder
    latent: tuple[int, ...]
    side: int


def super_resolution(folder: Path) -> SuperResolution:
    """The parts of the folder; EdgegenError for a setting that edgegen's networks do not have."""
    name = "unet/config.json"
    config = config_of(folder, "unet")
    side = single(config, "sample_size", None, name)
    channels = single(config, "in_channels", 3, name) - PICTURE_CHANNELS
    if channels < 1 or channels != single(config, "out_channels", 3, name):
        raise EdgegenError(
            f"`in_channels` in `{name}` is {channels + PICTURE_CHANNELS}, and the UNet must take its latent and a "
            f"picture of {PICTURE_CHANNELS} channels side by side",
            hint=SAVE_HINT,
        )
    for key, known in zip(("down_block_types", "up_block_types"), BLOCKS, strict=True):
        found = config.get(key)
        if not isinstance(found, list) or not all(one in known for one in found):
            raise EdgegenError(f"`{key}` in `{name}` is {found!r}; known are {', '.join(known)}", hint=SAVE_HINT)
    require(config, {key: (allowed[0], allowed) for key, allowed in ABSENT.items()}, name)
    state = weights(folder, "unet", STEM)
    require_depth(config, len(state), name)
    width = sizes(config, "block_out_channels", [224, 448, 672, 896], name)[0]
    if "conv_in.weight" not in state or state["conv_in.weight"].shape[1:2] != (channels + PICTURE_CHANNELS,):
        raise EdgegenError(f"`conv_in.weight` of the UNet does not fit `in_channels` in `{name}`", hint=SAVE_HINT)
    picture, rest = halves(state, channels)
    own: dict[str, Any] = {key: value for key, value in config.items() if not key.startswith("_")}
    return SuperResolution(
        Part("picture_features", {"width": width}, picture, {"features": (1, width, side, side)}),
        Part("super_resolution_unet", {"unet": own}, rest),
        decoder(folder, "VQModel", "vqvae"),
        (1, channels, side, side),
        side,
    )


def require_unscaled(sampler: SamplerConfig) -> None:
    """EdgegenError for a sampler that scales what the UNet sees: the pipeline scales the picture with it, anew at every
    step, and the picture's half runs once."""
    if any(step.input_scale != 1.0 for steps in sampler.times for step in sampler.table(steps)):
        raise EdgegenError(
            "the scheduler scales the UNet's input, and in this pipeline the picture with it",
            hint="save the pipeline with `DDIMScheduler`, or `LCMScheduler` where the student was distilled for it",
        )
