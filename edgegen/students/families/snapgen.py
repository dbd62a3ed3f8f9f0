"""SnapGen (Hu et al. 2024, arXiv 2412.09619): a UNet of separable convolutions for phones, 1024x1024, 4 to 8 steps."""

from __future__ import annotations

from edgegen.students.config import LatentConfig, StudentConfig
from edgegen.students.families.registry import Family
from edgegen.students.families.text_to_image import (
    Network,
    clip_l,
    clip_pair,
    from_folder,
    open_clip_g,
    text_to_image,
    tiny_clip,
)
from edgegen.students.networks.separable_decoder import SeparableDecoderConfig
from edgegen.students.networks.snapgen_unet import SnapGenUNetConfig
from edgegen.students.sampler import SamplerConfig

SHIFT = 3.0
# Stable Diffusion 3's autoencoder: a pipeline hands latent / 1.5305 + 0.0609 to the decoder.
SCALE, OFFSET = 1 / 1.5305, 0.0609


def shifted(steps: int) -> tuple[float, ...]:
    """Sigmas where `steps` equal steps start, shifted towards noise by 3 (Esser et al. 2024, arXiv 2403.03206)."""
    even = [1 - i / steps for i in range(steps)]
    return tuple(SHIFT * sigma / (1 + (SHIFT - 1) * sigma) for sigma in even)


def few_steps(*counts: int) -> SamplerConfig:
    """Euler steps of flow matching for each of `counts`; the first is what a student takes by itself."""
    return SamplerConfig(
        scheduler="flow_match_euler",
        prediction_type="velocity",
        times={count: shifted(count) for count in counts},
        default_steps=counts[0],
    )


def full() -> StudentConfig:
    unet = SnapGenUNetConfig(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        block_out_channels=(256, 512, 896),
        num_heads=(4, 8, 14),
        cross_attention_dim=2304,
    )
    return text_to_image(
        "snapgen",
        clip_pair(clip_l(), open_clip_g(), pooled=1280, width=2304),
        Network(architecture="snapgen_unet", config=unet),
        Network(architecture="separable_decoder", config=SeparableDecoderConfig(latent_channels=16)),
        LatentConfig(shape=(1, 16, 128, 128), scale=SCALE, shift=OFFSET),
        few_steps(4, 8),
    )


def tiny() -> StudentConfig:
    unet = SnapGenUNetConfig(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(16, 32),
        down_transformer_layers=(1, 2),
        up_transformer_layers=(0, 1),
        num_heads=(2, 4),
        layers_per_block=1,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    decoder = SeparableDecoderConfig(
        latent_channels=16, widths=(32, 32, 16, 16), num_blocks=(1, 1, 1, 1), norm_num_groups=8
    )
    return text_to_image(
        "snapgen-tiny",
        clip_pair(tiny_clip(24, 2, "quick_gelu"), tiny_clip(32, 2, "gelu"), pooled=24, width=64),
        Network(architecture="snapgen_unet", config=unet),
        Network(architecture="separable_decoder", config=decoder),
        LatentConfig(shape=(1, 16, 8, 8), scale=SCALE, shift=OFFSET),
        few_steps(4, 8),
    )


SNAPGEN = Family(
    name="snapgen",
    summary="SnapGen: separable-convolution UNet with multi-query attention, 4 to 8 steps, 1.4 M decoder; 1024x1024",
    sizes={"full": full, "tiny": tiny},
    sources=(
        "SnapGen, arXiv 2412.09619: widths, depths, separable convolutions, MQA, QK RMSNorm, rotary positions, decoder",
        "diffusers `DreamLiteUNetModel` (DreamLite, arXiv 2603.28713, which took over SnapGen's UNet): block order, "
        "names, depth 1 in the first level, none in the last, context 2304",
    ),
    readings=(
        "no weights are public; UNet names are those of `DreamLiteUNetModel`, decoder names are ours",
        "the UNet has 383.7 M parameters, the paper says 379 M: what differs is not published. Context 2304 (the width "
        "of Gemma-2-2b) is DreamLite's; 1280 would make 379.0 M",
        "Gemma-2-2b is left out: the paper drops text encoders independently in training, so that fewer suffice. The "
        "features of CLIP-L and CLIP-G stand side by side, 2048 wide, and are filled up with zeros to 2304",
        "no pooled vector enters the time embedding; `pooled` is there and unused",
        "rotary positions turn queries and keys of self-attention, half of a head by row, half by column",
        "levels without self-attention keep its norm on the residual path, as DreamLite's code does",
        "decoder: widths 256, 256, 128, 64 with 4, 4, 3, 2 blocks and one GroupNorm a level make 1.36 M of the paper's "
        "1.38 M; latents are Stable Diffusion 3's, 16 channels at an eighth of the side",
        "steps are Euler's at sigmas shifted by 3",
    ),
    from_upstream=from_folder,
)
