"""SANA-Sprint (Chen et al. 2025, arXiv 2503.09641): a linear-attention transformer in 1 to 4 steps, at 32 pixels a
latent place."""

from __future__ import annotations

from functools import partial
from typing import Any

from edgegen.students.config import LatentConfig, StudentConfig
from edgegen.students.families.few_step import MASKED_TEXT, few_step, language_model, named
from edgegen.students.families.registry import Family
from edgegen.students.networks.diffusers_decoder import DiffusersDecoderConfig
from edgegen.students.networks.diffusers_transformer import DiffusersTransformerConfig

SHAPES = {
    # size: layers, heads, width of a head, heads and their width in cross-attention, latent side, text length
    "full": (28, 36, 32, 16, 72, 32, 300),
    "1.6b": (20, 70, 32, 20, 112, 32, 300),
    "tiny": (2, 2, 16, 2, 16, 8, 16),
}
GEMMA: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
TINY_GEMMA = {
    **GEMMA,
    "vocab_size": 49408,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
}


def dc_decoder(tiny: bool) -> DiffusersDecoderConfig:
    """DC-AE f32c32 (arXiv 2410.10733) as SANA uses it; 159 M parameters of decoder."""
    widths = (8, 8, 16, 16, 16, 16) if tiny else (128, 256, 512, 512, 1024, 1024)
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    scales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    config = {
        "latent_channels": 8 if tiny else 32,
        "attention_head_dim": 8 if tiny else 32,
        **{f"{side}_block_out_channels": widths for side in ("encoder", "decoder")},
        **{f"{side}_block_types": kinds for side in ("encoder", "decoder")},
        **{f"{side}_qkv_multiscales": scales for side in ("encoder", "decoder")},
        "encoder_layers_per_block": (1,) * 6 if tiny else (2, 2, 2, 3, 3, 3),
        "decoder_layers_per_block": (1,) * 6 if tiny else (3,) * 6,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
    }
    return DiffusersDecoderConfig(class_name="AutoencoderDC", autoencoder=config)


def sana_sprint(size: str) -> StudentConfig:
    """1024x1024 at its published sizes."""
    layers, heads, head, crossing, cross_head, side, length = SHAPES[size]
    tiny = size == "tiny"
    gemma = TINY_GEMMA if tiny else GEMMA
    channels = 8 if tiny else 32
    transformer: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "num_layers": layers,
        "num_cross_attention_heads": crossing,
        "cross_attention_head_dim": cross_head,
        "cross_attention_dim": crossing * cross_head,
        "caption_channels": gemma["hidden_size"],
        "mlp_ratio": 2.5,
        "sample_size": side,
        "patch_size": 1,
        "guidance_embeds": True,
        "qk_norm": "rms_norm_across_heads",
    }
    return few_step(
        named("sana-sprint", size),
        language_model("Gemma2Model", 0, gemma),
        {"context": (1, length, gemma["hidden_size"]), "mask": (1, length)},
        length,
        DiffusersTransformerConfig(class_name="SanaTransformer2DModel", transformer=transformer),
        MASKED_TEXT,
        dc_decoder(tiny),
        LatentConfig(shape=(1, channels, side, side), scale=1 / 0.41407),
        32,
        {"_class_name": "SCMScheduler"},
        default_steps=2,
    )


SANA_SPRINT = Family(
    name="sana-sprint",
    summary="SANA-Sprint 0.6B (`full`) and 1.6B: linear attention, DC-AE, Gemma 2, 1 to 4 steps; 1024x1024",
    sizes={size: partial(sana_sprint, size) for size in SHAPES},
    sources=(
        "SANA-Sprint: arXiv 2503.09641; SANA: arXiv 2410.10629; DC-AE: arXiv 2410.10733",
        "defaults of diffusers' SanaTransformer2DModel (SANA 1.6B) and AutoencoderDC (f32c32)",
    ),
    readings=(
        "the 0.6B's transformer is SANA 0.6B's (28 layers of 1152) with guidance embedded and norms on q and k",
        "prompts without SANA's long instruction in front: a folder brings its tokenizer, and there they have it",
    ),
)
