"""MobileI2V (arXiv 2511.21475): a picture and how much should move -> 17 frames of 1280x720, in one or two steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.config import ComponentConfig, LatentConfig, StudentConfig
from edgegen.students.families.registry import Family
from edgegen.students.sampler import SamplerConfig

if TYPE_CHECKING:
    from torch import Tensor

SOURCES = (
    "arXiv 2511.21475 (MobileI2V)",
    "https://github.com/hustvl/MobileI2V: diffusion/model/nets/mobiledit.py (`Mobiledit_300M_P1_D16`), sana_blocks.py, "
    "rope.py, diffusion/flow_euler_sampler.py, configs/mobilei2v_config/MobileI2V_300M_img512.yaml",
    "arXiv 2508.09136, https://github.com/hustvl/Turbo-VAED: configs/Turbo-VAED-LTX.json",
    "arXiv 2501.00103 (LTX-Video); diffusers' `AutoencoderKLLTXVideo`, encoder of the 0.9.0 layout",
)
READINGS = (
    "the caption is embedded upstream and never read: its embedder (2,362,752 of 267,218,048 parameters) is dropped, "
    "and with it classifier-free guidance, which mixes two equal predictions",
    "upstream overwrites the first latent frame with the image's after every step; the denoiser answers with the "
    "velocity that leads there instead, which ends at the same latent",
    "flow shift 1.0 is the training configuration's; the public script samples with shift 3.0 and no list of times for "
    "one or two steps is published: sigma 1 and 0.5 are ours",
    "latents are scaled by 0.41407, as the training configuration says; the public code takes the factor of the "
    "autoencoder's own configuration where that has one",
    "the image's latent is the mean of the encoder's posterior; upstream draws from it",
    "the phone's decoder is Turbo-VAED in its LTX configuration: the public script decodes with LTX-Video's own",
)
SCALE = 0.41407
FRAME_RATE = 17
"""Frames a second in which the public script writes its 17 frames."""
CAPTION_KEYS = ("y_embedder.", "attention_y_norm.", "pos_embed")
"""What a checkpoint of the denoiser holds and nothing reads: the caption's path and tables of positions (`use_pe` is
off)."""


def _config(
    name: str,
    picture: tuple[int, int],
    denoiser: dict[str, Any],
    decoder: dict[str, Any],
    encoder: dict[str, Any],
    notes: tuple[str, ...] = (),
) -> StudentConfig:
    channels = denoiser["in_channels"]
    latent = (1, channels, denoiser["frames"], denoiser["height"], denoiser["width"])
    image_latent = (1, channels, 1, *latent[3:])
    frames = 8 * (latent[2] - 1) + 1

    def spec(of: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=of, shape=shape, dtype="float32")

    return StudentConfig(
        name=name,
        task="image-to-video",
        components={
            "image_encoder": ComponentConfig(
                architecture="video_encoder",
                config={**encoder, "latent_channels": channels, "scaling_factor": SCALE},
                inputs=(spec("image", 1, 3, *picture),),
                outputs=(spec("image_latent", *image_latent),),
            ),
            "denoiser": ComponentConfig(
                architecture="mobile_dit",
                config=denoiser,
                inputs=(
                    spec("latent", *latent),
                    spec("timestep", 1),
                    spec("image_latent", *image_latent),
                    spec("flow_score", 1),
                ),
                outputs=(spec("prediction", *latent),),
            ),
            "decoder": ComponentConfig(
                architecture="video_decoder",
                config={**decoder, "latent_channels": channels, "crop": picture},
                inputs=(spec("latent", *latent),),
                outputs=(spec("video", 1, 3, frames, *picture),),
            ),
        },
        sampler=SamplerConfig(
            scheduler="flow_match_euler",
            prediction_type="velocity",
            times={1: (1.0,), 2: (1.0, 0.5)},
            default_steps=2,
        ),
        latent=LatentConfig(shape=latent, scale=1 / SCALE),
        conditions={"flow_score": 1.0},
        frames_per_second=FRAME_RATE,
        notes=notes,
    )


def full() -> StudentConfig:
    """The public configuration: 1280x720, 17 frames, 3 x 23 x 40 = 2760 tokens."""
    return _config(
        "mobilei2v",
        (720, 1280),
        denoiser={
            "frames": 3,
            "height": 23,
            "width": 40,
            "in_channels": 128,
            "hidden_size": 1152,
            "head_dim": 72,
            "blocks": (*("linear",) * 7, "softmax") * 2,
            "mlp_ratio": 2.5,
            "frequency_size": 256,
            "rope_scale": (1.0, 1.4375, 2.5),
        },
        decoder={
            "block_out_channels": (64, 128, 256, 512),
            "layers_per_block": (3, 2, 3, 1, 1),
            "spatio_temporal_scaling": (True, True, True, False),
            "is_dw_conv": (False, False, False, True, True),
            "dw_kernel_size": 5,
        },
        encoder={
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": (4, 3, 3, 3, 4),
            "spatio_temporal_scaling": (True, True, True, False),
            "patch_size": 4,
        },
    )


def tiny() -> StudentConfig:
    """Every feature in small: both attentions, separable and whole convolutions, a grid that is cut: 17 frames of
    192x120."""
    return _config(
        "mobilei2v-tiny",
        (120, 192),
        denoiser={
            "frames": 3,
            "height": 4,
            "width": 6,
            "in_channels": 16,
            "hidden_size": 96,
            "head_dim": 24,
            "blocks": ("linear", "softmax"),
            "mlp_ratio": 2.5,
            "frequency_size": 64,
            "rope_scale": (1.0, 0.25, 0.375),
        },
        decoder={
            "block_out_channels": (16, 16, 16, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, True, False),
            "is_dw_conv": (False, False, False, True, True),
            "dw_kernel_size": 5,
        },
        encoder={
            "block_out_channels": (16, 16, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, True, False),
            "patch_size": 4,
        },
    )


def from_upstream(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The three checkpoints, their names under `denoiser.`, `decoder.` and `encoder.` -> ours, by component.

    The denoiser's names are those of the public code's `state_dict`; `encoder.` and `decoder.` are so called inside the
    autoencoders' own files already (LTX-Video's for the encoder, Turbo-VAED's for the decoder). What is not of these
    three is left out: the alignment heads of Turbo-VAED's training, latent statistics, the caption's path.
    """
    from edgegen.students.networks.video_encoder import collapse

    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "denoiser": {}, "decoder": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = value
    denoiser = {key: value for key, value in parts["denoiser"].items() if not key.startswith(CAPTION_KEYS)}
    decoder = {key: value for key, value in parts["decoder"].items() if not key.endswith("num_batches_tracked")}
    channels = denoiser["x_embedder.proj.weight"].shape[1] if "x_embedder.proj.weight" in denoiser else 128
    return {"image_encoder": collapse(parts["encoder"], channels), "denoiser": denoiser, "decoder": decoder}


MOBILEI2V = Family(
    name="mobilei2v",
    summary="image to video, 17 frames of 1280x720 in 1 or 2 steps: linear-attention transformer, Turbo-VAED decoder",
    sizes={"full": full, "tiny": tiny},
    sources=SOURCES,
    readings=READINGS,
    from_upstream=from_upstream,
)
