"""SD-Turbo and SDXL-Turbo (Sauer et al. 2023, arXiv 2311.17042): Stable Diffusion's UNets in 1 to 4 steps.

SDXL-Lightning, Hyper-SD and DMD2 are the same networks with other weights.
"""

from __future__ import annotations

from typing import Any

from edgegen.students.config import LatentConfig, StudentConfig
from edgegen.students.families.few_step import few_step, kl_decoder, named
from edgegen.students.families.registry import Family
from edgegen.students.families.text_to_image import clip_l, clip_pair, open_clip_g, open_clip_h, tiny_clip
from edgegen.students.networks.diffusers_unet import DiffusersUNetConfig

PAPER = "Adversarial Diffusion Distillation, arXiv 2311.17042"
TRAILING = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
}
CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")


def sd_turbo(size: str) -> StudentConfig:
    """Stable Diffusion 2.1's UNet, 512x512."""
    tiny = size == "tiny"
    unet: dict[str, Any] = {
        "sample_size": 8 if tiny else 64,
        "block_out_channels": (16, 32) if tiny else (320, 640, 1280, 1280),
        "down_block_types": (CROSS[0], *((CROSS[0],) * 2 if not tiny else ()), "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *((CROSS[1],) * 2 if not tiny else ()), CROSS[1]),
        "layers_per_block": 1 if tiny else 2,
        "attention_head_dim": (2, 4) if tiny else (5, 10, 20, 20),
        "cross_attention_dim": 32 if tiny else 1024,
        "use_linear_projection": True,
        "norm_num_groups": 8 if tiny else 32,
    }
    text = tiny_clip(32, 2, "gelu") if tiny else open_clip_h()
    length = text.max_position_embeddings
    return few_step(
        named("sd-turbo", size),
        text,
        {"context": (1, length, text.hidden_size)},
        length,
        DiffusersUNetConfig(unet=unet),
        ("context",),
        kl_decoder(4, tiny=tiny),
        LatentConfig(shape=(1, 4, unet["sample_size"], unet["sample_size"]), scale=1 / 0.18215),
        8,
        {"_class_name": "EulerDiscreteScheduler", **TRAILING},
        default_steps=1,
    )


def sdxl_turbo(size: str) -> StudentConfig:
    """SDXL's UNet, at 512x512 as SDXL-Turbo was trained."""
    tiny = size == "tiny"
    side = 8 if tiny else 64
    pooled, embedded = (24, 8) if tiny else (1280, 256)
    pair = (
        clip_pair(tiny_clip(24, 2, "quick_gelu"), tiny_clip(32, 2, "gelu"), pooled)
        if tiny
        else clip_pair(clip_l(), open_clip_g(), pooled)
    )
    width = pair.first.text.hidden_size + pair.second.text.hidden_size
    length = pair.first.text.max_position_embeddings
    unet: dict[str, Any] = {
        "sample_size": side,
        "block_out_channels": (16, 32) if tiny else (320, 640, 1280),
        "down_block_types": ("DownBlock2D", CROSS[0]) if tiny else ("DownBlock2D", CROSS[0], CROSS[0]),
        "up_block_types": (CROSS[1], "UpBlock2D") if tiny else (CROSS[1], CROSS[1], "UpBlock2D"),
        "layers_per_block": 1 if tiny else 2,
        "transformer_layers_per_block": (1, 2) if tiny else (1, 2, 10),
        "attention_head_dim": (2, 4) if tiny else (5, 10, 20),
        "cross_attention_dim": width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": embedded,
        "projection_class_embeddings_input_dim": pooled + 6 * embedded,
        "norm_num_groups": 8 if tiny else 32,
    }
    pixels = 8.0 * side
    return few_step(
        named("sdxl-turbo", size),
        pair,
        {"context": (1, length, width), "pooled": (1, pooled)},
        length,
        DiffusersUNetConfig(unet=unet, time_ids=(pixels, pixels, 0.0, 0.0, pixels, pixels)),
        ("context", "pooled"),
        kl_decoder(4, tiny=tiny),
        LatentConfig(shape=(1, 4, side, side), scale=1 / 0.13025),
        8,
        {"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING},
        default_steps=1,
    )


SD_TURBO = Family(
    name="sd-turbo",
    summary="SD-Turbo: Stable Diffusion 2.1's UNet in 1 to 4 steps; 512x512",
    sizes={"full": lambda: sd_turbo("full"), "tiny": lambda: sd_turbo("tiny")},
    sources=(PAPER, "UNet, text encoder and autoencoder: stable-diffusion-2-1's config.json files"),
    padding=0,
)
SDXL_TURBO = Family(
    name="sdxl-turbo",
    summary="SDXL-Turbo: SDXL's UNet in 1 to 4 steps; 512x512 (Lightning, Hyper-SD, DMD2 have the same networks)",
    sizes={"full": lambda: sdxl_turbo("full"), "tiny": lambda: sdxl_turbo("tiny")},
    sources=(PAPER, "SDXL: arXiv 2307.01952, and stable-diffusion-xl-base-1.0's config.json files"),
)
