"""SnapGen++ (Hu et al. 2026, arXiv 2601.08303): a three-stage diffusion transformer for phones, 1024x1024, 4 steps."""

from __future__ import annotations

from edgegen.students.config import LatentConfig, StudentConfig
from edgegen.students.families.registry import Family
from edgegen.students.families.snapgen import few_steps
from edgegen.students.families.text_to_image import Network, clip_l, text_to_image, tiny_clip
from edgegen.students.networks.separable_decoder import SeparableDecoderConfig
from edgegen.students.networks.snapgenpp_dit import SnapGenPlusConfig

# The autoencoder of Flux, which the paper's ablations use: latent / 0.3611 + 0.1159 is what the decoder is given.
SCALE, OFFSET = 1 / 0.3611, 0.1159


def of_width(name: str, width: int) -> StudentConfig:
    """A network of the elastic family, 64 channels a head."""
    return text_to_image(
        f"snapgenpp-{name}",
        clip_l(),
        Network(architecture="snapgenpp_dit", config=SnapGenPlusConfig(sample_size=128, hidden_size=width)),
        Network(architecture="separable_decoder", config=SeparableDecoderConfig(latent_channels=16)),
        LatentConfig(shape=(1, 16, 128, 128), scale=SCALE, shift=OFFSET),
        few_steps(4),
    )


def tiny() -> StudentConfig:
    dit = SnapGenPlusConfig(
        sample_size=16,
        hidden_size=32,
        head_dim=8,
        depths=(1, 3, 1),
        cross_attention_dim=32,
        num_blocks=4,
    )
    decoder = SeparableDecoderConfig(
        latent_channels=16, widths=(32, 32, 16, 16), num_blocks=(1, 1, 1, 1), norm_num_groups=8
    )
    return text_to_image(
        "snapgenpp-tiny",
        tiny_clip(32, 2, "quick_gelu"),
        Network(architecture="snapgenpp_dit", config=dit),
        Network(architecture="separable_decoder", config=decoder),
        LatentConfig(shape=(1, 16, 16, 16), scale=SCALE, shift=OFFSET),
        few_steps(4),
    )


SNAPGENPP = Family(
    name="snapgenpp",
    summary="SnapGen++: three-stage transformer with global-local sparse attention, 4 steps; 1024x1024",
    sizes={
        "full": lambda: of_width("full", 2048),
        "small-0.4b": lambda: of_width("small-0.4b", 1024),
        "tiny-0.3b": lambda: of_width("tiny-0.3b", 768),
        "tiny": tiny,
    },
    sources=(
        "SnapGen++, arXiv 2601.08303: three stages at 64x64, 32x32 and 64x64 tokens; keys and values compressed by a "
        "2x2 convolution of stride 2; blockwise neighbourhood attention with 16 blocks and radius 1; a sigmoid gate a "
        "head that depends on the input; 8 key and value heads; LayerNorm and rotary positions on queries and keys; "
        "feed-forward ratio 4, 3, 4; long skips within the middle; widths 0.375, 0.5 and 1 of the elastic network",
        "PixArt-alpha, arXiv 2310.00426: the block that it starts from, 28 of them",
    ),
    readings=(
        "no weights are public: the parameter names are ours",
        "width 2048 for 1.6 B: 1024 and 768 then have 64 channels a head and, two query heads a key, 8 key heads at "
        "0.4 B. Counts: 1657 M, 439 M and 256 M; the paper says 1.6 B, 0.4 B (429 M in its ablation) and 0.3 B",
        "depths 8, 10, 10: half of 28 blocks in the middle and slightly more in the up stage make 6, 14, 8, and four "
        "blocks of the middle are moved, two to each side; the figure's own numbers could not be read",
        "the compressing convolution is each key head's own, after norm and rotation; blocks are runs of whole rows",
        "cross-attention has as many key heads as query heads; the skip around the middle joins by concatenation",
        "halving and doubling the side are 2x2 convolutions of stride 2, plain and transposed",
        "text is CLIP-L, latents are Flux's 16 channels, as in the paper's ablations; the trained model reads TinyCLIP "
        "and Gemma-3-4b and draws in Qwen-Image's latent, and could drop either encoder",
        "the decoder is SnapGen's; steps are Euler's at sigmas shifted by 3, as the paper's few-step teacher has them",
    ),
)
