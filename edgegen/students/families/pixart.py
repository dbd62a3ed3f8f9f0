"""PixArt (Chen et al. 2023, arXiv 2310.00426) with consistency distillation (PixArt-delta, arXiv 2401.05252)."""

from __future__ import annotations

from typing import Any

from edgegen.students.config import LatentConfig, StudentConfig
from edgegen.students.families.few_step import MASKED_TEXT, few_step, kl_decoder, language_model, named
from edgegen.students.families.registry import Family
from edgegen.students.networks.diffusers_transformer import DiffusersTransformerConfig

T5: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
TINY_T5 = {**T5, "vocab_size": 49408, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def pixart(size: str) -> StudentConfig:
    """PixArt-alpha XL/2, 1024x1024, told the size of its picture."""
    tiny = size == "tiny"
    t5 = TINY_T5 if tiny else T5
    side, length = (8, 16) if tiny else (128, 120)
    heads, head = (2, 18) if tiny else (16, 72)
    transformer: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2 if tiny else 28,
        "cross_attention_dim": heads * head,
        "sample_size": side,
        "patch_size": 2,
        "norm_num_groups": 4 if tiny else 32,
        "caption_channels": t5["d_model"],
        "use_additional_conditions": True,
    }
    return few_step(
        named("pixart", size),
        language_model("T5EncoderModel", 0, t5),
        {"context": (1, length, t5["d_model"]), "mask": (1, length)},
        length,
        DiffusersTransformerConfig(
            class_name="PixArtTransformer2DModel", transformer=transformer, pixels=(8 * side, 8 * side)
        ),
        MASKED_TEXT,
        kl_decoder(4, tiny=tiny),
        LatentConfig(shape=(1, 4, side, side), scale=1 / 0.18215),
        8,
        {"_class_name": "LCMScheduler"},
        default_steps=4,
    )


PIXART = Family(
    name="pixart",
    summary="PixArt-alpha XL/2 by consistency distillation: T5, 4 steps; 1024x1024",
    sizes={"full": lambda: pixart("full"), "tiny": lambda: pixart("tiny")},
    sources=(
        "PixArt-alpha: arXiv 2310.00426; PixArt-delta: arXiv 2401.05252",
        "PixArtTransformer2DModel's own defaults in diffusers; T5 1.1 XXL: arXiv 1910.10683 and its config.json",
    ),
    readings=("betas of LCM's scheduler are Stable Diffusion's",),
)
