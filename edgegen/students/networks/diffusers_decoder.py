"""Decoders of diffusers' autoencoders: `AutoencoderKL`, `AutoencoderDC` and `AutoencoderTiny`.

The encoder is never kept. `edgegen.students.networks.tiny_decoder` is the same network for the tiny ones that it
covers, and is used for those.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from edgegen.students.networks.upstream import constructor_arguments, upstream_class


class DiffusersDecoderConfig(BaseModel):
    """`autoencoder` is the `config.json` of an autoencoder of class `class_name`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    class_name: Literal["AutoencoderKL", "AutoencoderDC", "AutoencoderTiny"]
    autoencoder: dict[str, Any]


class DiffusersDecoder(nn.Module):
    """Decoder: latent [1, C, h, w] -> image [1, 3, H, W] about -1..1, not clipped, as the autoencoder's own `decode`.

    What a pipeline does before (scaling and shift) belongs to the student's latent. Parameters: `decoder.*` and, where
    the autoencoder has it, `post_quant_conv.*`.
    """

    def __init__(self, config: DiffusersDecoderConfig) -> None:
        super().__init__()
        self.config = config
        made = upstream_class("diffusers", config.class_name)
        whole = made(**constructor_arguments(made, config.autoencoder, config.class_name))
        self.decoder: nn.Module = whole.decoder
        self.post_quant_conv: nn.Module | None = getattr(whole, "post_quant_conv", None)

    def forward(self, latent: Tensor) -> Tensor:
        given = latent if self.post_quant_conv is None else self.post_quant_conv(latent)
        return self.decoder(given)
