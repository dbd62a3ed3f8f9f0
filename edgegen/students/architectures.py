"""Networks that a checkpoint may name. A name that is not here is refused: nothing is ever imported from a
checkpoint."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.students.networks.clip_pair import ClipPair, ClipPairConfig
from edgegen.students.networks.clip_text import ClipTextConfig, ClipTextEncoder
from edgegen.students.networks.diffusers_decoder import DiffusersDecoder, DiffusersDecoderConfig
from edgegen.students.networks.diffusers_transformer import DiffusersTransformer, DiffusersTransformerConfig
from edgegen.students.networks.diffusers_unet import DiffusersUNet, DiffusersUNetConfig
from edgegen.students.networks.mobile_dit import MobileDiT, MobileDiTConfig
from edgegen.students.networks.separable_decoder import SeparableDecoder, SeparableDecoderConfig
from edgegen.students.networks.snapgen_unet import SnapGenUNet, SnapGenUNetConfig
from edgegen.students.networks.snapgenpp_dit import SnapGenPlusConfig, SnapGenPlusDiT
from edgegen.students.networks.super_resolution import (
    PictureFeatures,
    PictureFeaturesConfig,
    SuperResolutionUNet,
    SuperResolutionUNetConfig,
)
from edgegen.students.networks.tiny_decoder import TinyDecoder, TinyDecoderConfig
from edgegen.students.networks.transformers_text import TransformersText, TransformersTextConfig
from edgegen.students.networks.unet import UNet, UNetConfig
from edgegen.students.networks.video_decoder import VideoDecoder, VideoDecoderConfig
from edgegen.students.networks.video_encoder import VideoEncoder, VideoEncoderConfig
from edgegen.students.networks.z_image import ZImage, ZImageConfig

ARCHITECTURES: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "clip_text": (ClipTextConfig, ClipTextEncoder),
    "clip_pair": (ClipPairConfig, ClipPair),
    "diffusers_decoder": (DiffusersDecoderConfig, DiffusersDecoder),
    "diffusers_transformer": (DiffusersTransformerConfig, DiffusersTransformer),
    "diffusers_unet": (DiffusersUNetConfig, DiffusersUNet),
    "transformers_text": (TransformersTextConfig, TransformersText),
    "z_image": (ZImageConfig, ZImage),
    "picture_features": (PictureFeaturesConfig, PictureFeatures),
    "super_resolution_unet": (SuperResolutionUNetConfig, SuperResolutionUNet),
    "unet": (UNetConfig, UNet),
    "separable_decoder": (SeparableDecoderConfig, SeparableDecoder),
    "snapgen_unet": (SnapGenUNetConfig, SnapGenUNet),
    "snapgenpp_dit": (SnapGenPlusConfig, SnapGenPlusDiT),
    "tiny_decoder": (TinyDecoderConfig, TinyDecoder),
    "mobile_dit": (MobileDiTConfig, MobileDiT),
    "video_decoder": (VideoDecoderConfig, VideoDecoder),
    "video_encoder": (VideoEncoderConfig, VideoEncoder),
}


def build_module(architecture: str, config: dict[str, Any]) -> nn.Module:
    """An initialised network in eval mode; EdgegenError for an unknown architecture or a config it cannot have."""
    if architecture not in ARCHITECTURES:
        known = ", ".join(f"`{name}`" for name in ARCHITECTURES)
        raise EdgegenError(f"architecture `{architecture}` is unknown", hint=f"this version knows {known}")
    config_type, module_type = ARCHITECTURES[architecture]
    try:
        parsed = config_type.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or architecture
        raise EdgegenError(f"config of `{architecture}` does not fit at `{where}`: {first['msg']}") from error
    module: nn.Module = module_type(parsed)
    return module.eval().requires_grad_(False)
