"""SD3.5-Flash (Bandyopadhyay et al. 2025, arXiv 2509.21318): Stable Diffusion 3.5 Medium's transformer in 4 steps."""

from __future__ import annotations

from typing import Any

from edgegen.students.config import LatentConfig, StudentConfig
from edgegen.students.families.few_step import few_step, kl_decoder, named
from edgegen.students.families.registry import Family
from edgegen.students.families.text_to_image import END, clip_l, open_clip_g, tiny_clip
from edgegen.students.networks.clip_pair import ClipHalfConfig, ClipPairConfig
from edgegen.students.networks.diffusers_transformer import DiffusersTransformerConfig

ABSENT = 256


def sd35_flash(size: str) -> StudentConfig:
    """1024x1024, with the two CLIP encoders and zeros for the third."""
    tiny = size == "tiny"
    side, channels = (8, 8) if tiny else (128, 16)
    first, second = (tiny_clip(24, 2, "quick_gelu"), tiny_clip(32, 2, "gelu")) if tiny else (clip_l(), open_clip_g())
    pooled, width = ((24, 32), 64) if tiny else ((768, 1280), 4096)
    pair = ClipPairConfig(
        first=ClipHalfConfig(text=first, projection_dim=pooled[0], eos_token_id=END),
        second=ClipHalfConfig(text=second, projection_dim=pooled[1], eos_token_id=END, pad_token_id=0),
        width=width,
        absent_tokens=8 if tiny else ABSENT,
    )
    heads, head = (2, 16) if tiny else (24, 64)
    transformer: dict[str, Any] = {
        "sample_size": side,
        "patch_size": 2,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": 2 if tiny else 24,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "joint_attention_dim": width,
        "caption_projection_dim": heads * head,
        "pooled_projection_dim": sum(pooled),
        "pos_embed_max_size": 8 if tiny else 384,
        "dual_attention_layers": (0,) if tiny else tuple(range(13)),
        "qk_norm": "rms_norm",
    }
    length = first.max_position_embeddings
    return few_step(
        named("sd3.5-flash", size),
        pair,
        {"context": (1, length + pair.absent_tokens, width), "pooled": (1, sum(pooled))},
        length,
        DiffusersTransformerConfig(class_name="SD3Transformer2DModel", transformer=transformer),
        ("context", "pooled"),
        kl_decoder(channels, quantized=False, tiny=tiny),
        LatentConfig(shape=(1, channels, side, side), scale=1 / 1.5305, shift=0.0609),
        8,
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        default_steps=4,
    )


SD35_FLASH = Family(
    name="sd3.5-flash",
    summary="SD3.5-Flash: Stable Diffusion 3.5 Medium's MMDiT in 4 steps of flow; 1024x1024",
    sizes={"full": lambda: sd35_flash("full"), "tiny": lambda: sd35_flash("tiny")},
    sources=("SD3.5-Flash: arXiv 2509.21318; SD3: arXiv 2403.03206", "stable-diffusion-3.5-medium's config.json files"),
    readings=(
        "T5-XXL is left out, with the zeros that diffusers has where it is not loaded; so does the paper on devices",
        "steps are Stable Diffusion 3.5's own schedule, shift 3, cut into 1, 2, 4 or 8",
    ),
)
