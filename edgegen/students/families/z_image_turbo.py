"""Z-Image-Turbo (Z-Image Team 2025, arXiv 2511.22699): a single-stream transformer of 6 B in 8 steps."""

from __future__ import annotations

from typing import Any

from edgegen.students.config import LatentConfig, StudentConfig
from edgegen.students.families.few_step import MASKED_TEXT, few_step, kl_decoder, language_model, named
from edgegen.students.families.registry import Family
from edgegen.students.networks.z_image import ZImageConfig
from edgegen.students.schedulers import FlowSpacing

QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
}
PAD = 151643
TINY_QWEN: dict[str, Any] = {
    **QWEN,
    "vocab_size": 49408,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def z_image_turbo(size: str) -> StudentConfig:
    """1024x1024 from a prompt of up to 512 tokens."""
    tiny = size == "tiny"
    qwen = TINY_QWEN if tiny else QWEN
    side, channels, length = (8, 4, 32) if tiny else (128, 16, 512)
    transformer: dict[str, Any] = {"cap_feat_dim": qwen["hidden_size"], "in_channels": channels}
    if tiny:
        transformer |= {"dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        transformer |= {"axes_dims": (8, 12, 12), "axes_lens": (64, 16, 16)}
    else:
        transformer |= {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30}
        transformer |= {"axes_dims": (32, 48, 48), "axes_lens": (1536, 512, 512)}
    return few_step(
        named("z-image-turbo", size),
        language_model("Qwen3Model", 49407 if tiny else PAD, qwen, "penultimate"),
        {"context": (1, length, qwen["hidden_size"]), "mask": (1, length)},
        length,
        ZImageConfig(transformer=transformer, sample_size=side, text_length=length),
        MASKED_TEXT,
        kl_decoder(channels, quantized=False, tiny=tiny),
        LatentConfig(shape=(1, channels, side, side), scale=1 / 0.3611, shift=0.1159),
        8,
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        FlowSpacing(even=True),
        default_steps=8,
    )


Z_IMAGE_TURBO = Family(
    name="z-image-turbo",
    summary="Z-Image-Turbo: single-stream transformer of 6 B, Qwen 3 4B, 8 steps of flow; 1024x1024",
    sizes={"full": lambda: z_image_turbo("full"), "tiny": lambda: z_image_turbo("tiny")},
    sources=(
        "Z-Image: arXiv 2511.22699; ZImageTransformer2DModel's own defaults in diffusers",
        "Qwen 3 4B: arXiv 2505.09388, table 1; the autoencoder is that of FLUX.1",
    ),
    readings=("axes_lens, the reach of the rotary tables, is 1536, 512, 512; only tables depend on it",),
)
