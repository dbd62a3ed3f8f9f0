"""SDXS (Song et al. 2024, arXiv 2403.16627): Stable Diffusion's UNet without its middle, in one step, with TAESD."""

from __future__ import annotations

from edgegen.students.config import LatentConfig, StudentConfig
from edgegen.students.families.registry import Family
from edgegen.students.families.text_to_image import (
    Network,
    clip_l,
    clip_pair,
    from_folder,
    open_clip_g,
    open_clip_h,
    text_to_image,
    tiny_clip,
)
from edgegen.students.networks.clip_text import ClipTextConfig
from edgegen.students.networks.diffusers_unet import DiffusersUNetConfig
from edgegen.students.networks.tiny_decoder import TinyDecoderConfig
from edgegen.students.networks.unet import UNetConfig
from edgegen.students.sampler import SamplerConfig

SAMPLER = SamplerConfig(
    scheduler="ddim",
    prediction_type="epsilon",
    times={1: (999.0,)},
    default_steps=1,
    # The step ends at the schedule's first alpha-bar, not at the noiseless picture: 14.642586 x - 14.579274 eps.
    final_alpha="first",
)
TAESD = Network(
    architecture="tiny_decoder", config=TinyDecoderConfig(latent_channels=4, width=64, num_blocks=(3, 3, 3, 1))
)
TINY_TAESD = Network(
    architecture="tiny_decoder", config=TinyDecoderConfig(latent_channels=4, width=16, num_blocks=(1, 1, 1, 1))
)
PAPER = "SDXS: Real-Time One-Step Latent Diffusion Models with Image Conditions, arXiv 2403.16627"
CONFIGURATIONS = (
    "ComfyUI, comfy/model_detection.py: SD_XS and SD09_XS, the shapes by which it knows the two checkpoints"
)


def dreamshaper(size: str) -> StudentConfig:
    """On SD 1.5's text encoder: attention in the two lower levels."""
    if size == "full":
        unet = UNetConfig(
            sample_size=64, block_out_channels=(320, 640, 1280), cross_attention=(False, True, True), num_heads=8
        )
        text, decoder, side = clip_l(), TAESD, 64
    else:
        unet = UNetConfig(
            sample_size=8,
            block_out_channels=(16, 32),
            cross_attention=(False, True),
            num_heads=2,
            cross_attention_dim=32,
            norm_num_groups=8,
        )
        text, decoder, side = tiny_clip(32, 2, "quick_gelu"), TINY_TAESD, 8
    return _sdxs("sdxs-512", size, text, unet, decoder, side)


def nine(size: str) -> StudentConfig:
    """On SD 2.1's text encoder: attention in every level, in the first with the text alone."""
    if size == "full":
        unet = UNetConfig(
            sample_size=64,
            block_out_channels=(320, 640, 1280),
            cross_attention=(True, True, True),
            only_cross_attention=(True, False, False),
            num_heads=(5, 10, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
        text, decoder, side = open_clip_h(), TAESD, 64
    else:
        unet = UNetConfig(
            sample_size=8,
            block_out_channels=(16, 32),
            cross_attention=(True, True),
            only_cross_attention=(True, False),
            num_heads=(1, 2),
            cross_attention_dim=32,
            use_linear_projection=True,
            norm_num_groups=8,
        )
        text, decoder, side = tiny_clip(32, 2, "gelu"), TINY_TAESD, 8
    return _sdxs("sdxs-512-0.9", size, text, unet, decoder, side)


def thousand(size: str) -> StudentConfig:
    """On SDXL's two text encoders, with their pooled vector and the sizes of the picture beside the time."""
    unet: dict[str, object] = {
        "mid_block_type": None,
        "layers_per_block": 1,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
    }
    if size == "full":
        unet |= {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 4, 4),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        }
        text, decoder, side = clip_pair(clip_l(), open_clip_g(), pooled=1280), TAESD, 128
    else:
        unet |= {
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (16, 32),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (1, 2),
            "cross_attention_dim": 56,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
            "norm_num_groups": 8,
        }
        pair = clip_pair(tiny_clip(24, 2, "quick_gelu"), tiny_clip(32, 2, "gelu"), pooled=24)
        text, decoder, side = pair, TINY_TAESD, 8
    pixels = 8.0 * side
    return text_to_image(
        _name("sdxs-1024", size),
        text,
        Network(
            architecture="diffusers_unet",
            config=DiffusersUNetConfig(unet=unet, time_ids=(pixels, pixels, 0.0, 0.0, pixels, pixels)),
        ),
        decoder,
        LatentConfig(shape=(1, 4, side, side)),
        SAMPLER,
        reads_pooled=True,
    )


def _sdxs(name: str, size: str, text: ClipTextConfig, unet: UNetConfig, decoder: Network, side: int) -> StudentConfig:
    """One step from a latent of `side` rows and columns."""
    network, latent = Network(architecture="unet", config=unet), LatentConfig(shape=(1, 4, side, side))
    return text_to_image(_name(name, size), text, network, decoder, latent, SAMPLER)


def _name(family: str, size: str) -> str:
    return family if size == "full" else f"{family}-{size}"


SDXS_512 = Family(
    name="sdxs-512",
    summary="SDXS-512-DreamShaper: SD 1.5's UNet without its middle, one step, TAESD; 512x512",
    sizes={"full": lambda: dreamshaper("full"), "tiny": lambda: dreamshaper("tiny")},
    sources=(PAPER, CONFIGURATIONS, "TAESD: github.com/madebyollin/taesd"),
    from_upstream=from_folder,
)
SDXS_512_09 = Family(
    name="sdxs-512-0.9",
    summary="SDXS-512-0.9: SD 2.1's text encoder, attention in every level, one step, TAESD; 512x512",
    sizes={"full": lambda: nine("full"), "tiny": lambda: nine("tiny")},
    sources=(PAPER, CONFIGURATIONS, "Model card of sdxs-512-0.9: cross-attention in place of self-attention on top"),
    readings=(
        "the first level's self-attention reads the text: the model card says so and a published fp16 file of the "
        "UNet, 656 MB, has this count of parameters (328.2 M); with self-attention there it would be 326.8 M",
    ),
    padding=0,
    from_upstream=from_folder,
)
SDXS_1024 = Family(
    name="sdxs-1024",
    summary="SDXS-1024: SDXL's UNet without its middle, one step, TAESD; 1024x1024",
    sizes={"full": lambda: thousand("full"), "tiny": lambda: thousand("tiny")},
    sources=(PAPER, "SDXL: arXiv 2307.01952"),
    readings=(
        "its weights were never published: the paper says 0.74 B parameters of UNet and SDXL as the teacher",
        "one residual block a level and no middle, as in SDXS-512; transformers 0, 4, 4 deep are what then makes "
        "738.6 M, SDXL's own 2 and 10 make 1304 M",
        "text encoders, pooled vector, sizes and betas are SDXL's; the decoder is TAESD at 1024x1024",
    ),
    from_upstream=from_folder,
)
