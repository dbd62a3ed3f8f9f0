"""Networks that a checkpoint may name. A name that is not here is refused: nothing is ever imported from a
checkpoint."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.students.networks.clip_text import ClipTextConfig, ClipTextEncoder
from edgegen.students.networks.tiny_decoder import TinyDecoder, TinyDecoderConfig
from edgegen.students.networks.unet import UNet, UNetConfig

ARCHITECTURES: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "clip_text": (ClipTextConfig, ClipTextEncoder),
    "unet": (UNetConfig, UNet),
    "tiny_decoder": (TinyDecoderConfig, TinyDecoder),
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
