"""The denoiser of a folder: edgegen's own UNet where it is the same network, else diffusers' class with its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegen.errors import EdgegenError
from edgegen.students.networks.diffusers_unet import ABSENT
from edgegen.students.pipelines.files import (
    SAVE_HINT,
    Part,
    config_of,
    fits,
    require,
    require_depth,
    single,
    sizes,
    weights,
)

if TYPE_CHECKING:
    from torch import Tensor

STEM = "diffusion_pytorch_model"
MAX_SIDE = 1024
"""Of a latent: diffusers fills tables of positions with memory for all of them, before any weight is compared."""

OWN_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # key: (diffusers' default, the values that leave the arithmetic as that of our own UNet)
    "center_input_sample": (False, (False,)),
    "flip_sin_to_cos": (True, (True,)),
    "freq_shift": (0, (0,)),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", (None,)),
    "only_cross_attention": (False, (False,)),
    "downsample_padding": (1, (1,)),
    "act_fn": ("silu", ("silu", "swish")),
    "norm_eps": (1e-5, (1e-5,)),
    "transformer_layers_per_block": (1, (1,)),
    "reverse_transformer_layers_per_block": (None, (None,)),
    "encoder_hid_dim": (None, (None,)),
    "encoder_hid_dim_type": (None, (None,)),
    "num_attention_heads": (None, (None,)),
    "dual_cross_attention": (False, (False,)),
    "class_embed_type": (None, (None,)),
    "addition_embed_type": (None, (None,)),
    "num_class_embeds": (None, (None,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "resnet_skip_time_act": (False, (False,)),
    "resnet_out_scale_factor": (1.0, (1.0,)),
    "time_embedding_type": ("positional", ("positional",)),
    "time_embedding_dim": (None, (None,)),
    "time_embedding_act_fn": (None, (None,)),
    "timestep_post_act": (None, (None,)),
    "time_cond_proj_dim": (None, (None,)),
    "conv_in_kernel": (3, (3,)),
    "conv_out_kernel": (3, (3,)),
    "projection_class_embeddings_input_dim": (None, (None,)),
    "attention_type": ("default", ("default",)),
    "class_embeddings_concat": (False, (False,)),
    "mid_block_only_cross_attention": (None, (None, False)),
    "cross_attention_norm": (None, (None,)),
}
READ = (
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "attention_head_dim"),
    *("cross_attention_dim", "norm_num_groups", "down_block_types", "up_block_types"),
)
FREE = (
    # Precision, dropout, the missing mid block's own settings, and how the projections are stored.
    *("dropout", "upcast_attention", "mid_block_scale_factor", "use_linear_projection", "addition_time_embed_dim"),
    "addition_embed_type_num_heads",
)
BLOCKS = {"DownBlock2D": ("UpBlock2D", False), "CrossAttnDownBlock2D": ("CrossAttnUpBlock2D", True)}


@dataclass(frozen=True)
class Denoiser:
    """The denoiser, its latent, and which output of the text encoder it takes beside the context."""

    part: Part
    latent: tuple[int, ...]
    extra: str | None = None
    tokens: int | None = None
    """Tokens of the latent: what a schedule may depend on."""


def unet(folder: Path, factor: int, guidance_scale: float) -> Denoiser:
    """`UNet2DConditionModel`; `factor` is the pixels of one latent place, `guidance_scale` what a UNet that is told its
    guidance is told."""
    name = "unet/config.json"
    config = config_of(folder, "unet")
    for key in config:
        if not key.startswith("_") and key not in (*OWN_FIXED, *READ, *FREE):
            raise EdgegenError(f"`{key}` in `{name}` is a setting that edgegen does not know", hint=SAVE_HINT)
    down, up = config.get("down_block_types"), config.get("up_block_types")
    if not isinstance(down, list) or not all(kind in BLOCKS for kind in down):
        raise EdgegenError(f"`down_block_types` in `{name}` is {down!r}; known are {', '.join(BLOCKS)}", hint=SAVE_HINT)
    if up != [BLOCKS[kind][0] for kind in reversed(down)]:
        raise EdgegenError(
            f"`up_block_types` in `{name}` is {up!r}, not the mirror of `down_block_types`", hint=SAVE_HINT
        )
    if len(sizes(config, "block_out_channels", [320, 640, 1280, 1280], name)) != len(down):
        raise EdgegenError(f"`block_out_channels` in `{name}` does not have one entry a block", hint=SAVE_HINT)
    require(config, {key: (allowed[0], allowed) for key, allowed in ABSENT.items()}, name)
    side = single(config, "sample_size", None, name)
    latent = (1, single(config, "in_channels", 4, name), side, side)
    state = weights(folder, "unet", STEM)
    require_depth(config, len(state), name)
    if fits(config, OWN_FIXED) and len(set(_listed(config, "attention_head_dim", 8))) == 1:
        return Denoiser(Part("unet", _own_unet(config, name), _as_convolutions(state)), latent)
    sized = config.get("addition_embed_type") == "text_time"
    pixels = side * factor
    made = {
        "unet": {key: value for key, value in config.items() if not key.startswith("_")},
        "guidance_scale": guidance_scale,
        "time_ids": (pixels, pixels, 0, 0, pixels, pixels) if sized else (),
    }
    return Denoiser(Part("diffusers_unet", made, state), latent, "pooled" if sized else None)


def _listed(config: Mapping[str, Any], key: str, default: int) -> list[Any]:
    value = config.get(key, default)
    return value if isinstance(value, list) and value else [value]


def _own_unet(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        "sample_size": single(config, "sample_size", None, name),
        "in_channels": single(config, "in_channels", 4, name),
        "out_channels": single(config, "out_channels", 4, name),
        "block_out_channels": sizes(config, "block_out_channels", [320, 640, 1280, 1280], name),
        "cross_attention": [BLOCKS[kind][1] for kind in config["down_block_types"]],
        "layers_per_block": single(config, "layers_per_block", 2, name),
        # diffusers keeps the number of heads under this name for UNet2DConditionModel.
        "num_heads": single(config, "attention_head_dim", 8, name),
        "cross_attention_dim": single(config, "cross_attention_dim", 1280, name),
        "norm_num_groups": single(config, "norm_num_groups", 32, name),
    }


def _as_convolutions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A linear projection over channels is the 1x1 convolution that our UNet has."""
    return {
        key: value[:, :, None, None]
        if key.endswith(("proj_in.weight", "proj_out.weight")) and value.ndim == 2
        else value
        for key, value in state.items()
    }


def transformer(folder: Path, class_name: str, factor: int, guidance_scale: float) -> Denoiser:
    """SANA's, Stable Diffusion 3's or PixArt's transformer."""
    name = "transformer/config.json"
    config = config_of(folder, "transformer")
    side = _bounded(single(config, "sample_size", None, name), "sample_size", name)
    _bounded(single(config, "pos_embed_max_size", 96, name), "pos_embed_max_size", name)
    state = weights(folder, "transformer", STEM)
    require_depth(config, len(state), name)
    made: dict[str, Any] = {
        "class_name": class_name,
        "transformer": {key: value for key, value in config.items() if not key.startswith("_")},
        "guidance_scale": guidance_scale,
    }
    if class_name == "PixArtTransformer2DModel":
        made["pixels"] = (side * factor, side * factor)
    latent = (1, single(config, "in_channels", 4, name), side, side)
    patch = single(config, "patch_size", 1, name)
    extra = "pooled" if class_name == "SD3Transformer2DModel" else "mask"
    return Denoiser(Part("diffusers_transformer", made, state), latent, extra, (side // patch) ** 2)


def _bounded(side: int, key: str, name: str) -> int:
    if side > MAX_SIDE:
        raise EdgegenError(f"`{key}` in `{name}` is {side}, more than the {MAX_SIDE} allowed", hint=SAVE_HINT)
    return side


def z_image(folder: Path, side: int, text_length: int) -> Denoiser:
    """Z-Image's transformer for a latent of `side`."""
    name = "transformer/config.json"
    config = config_of(folder, "transformer")
    _bounded(side, "sample_size", "vae/config.json")
    state = weights(folder, "transformer", STEM)
    require_depth(config, len(state), name)
    require(config, {"siglip_feat_dim": (None, (None,))}, name)
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    made = {"transformer": own, "sample_size": side, "text_length": text_length}
    latent = (1, single(config, "in_channels", 16, name), side, side)
    return Denoiser(Part("z_image", made, state), latent, "mask", (side // 2) ** 2)
