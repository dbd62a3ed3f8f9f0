"""Decoders of diffusers' autoencoders: `AutoencoderKL`, `AutoencoderDC`, `AutoencoderTiny` and `VQModel`.

The encoder is never kept. `edgegen.students.networks.tiny_decoder` is the same network for the tiny ones that it
covers, and is used for those.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from edgegen.students.networks.upstream import constructor_arguments, upstream_class


class DiffusersDecoderConfig(BaseModel):
    """`autoencoder` is the `config.json` of an autoencoder of class `class_name`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    class_name: Literal["AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "VQModel"]
    autoencoder: dict[str, Any]


class DiffusersDecoder(nn.Module):
    """Decoder: latent [1, C, h, w] -> image [1, 3, H, W] about -1..1, not clipped, as the autoencoder's own `decode`.

    What a pipeline does before (scaling and shift) belongs to the student's latent. Parameters: `decoder.*` and, where
    the autoencoder has it, `post_quant_conv.*`; of a `VQModel` also `quantize.embedding.weight` [codes, C], of whose
    rows every place of the latent becomes the nearest.
    """

    def __init__(self, config: DiffusersDecoderConfig) -> None:
        super().__init__()
        self.config = config
        made = upstream_class("diffusers", config.class_name)
        whole = made(**constructor_arguments(made, config.autoencoder, config.class_name))
        self.decoder: nn.Module = whole.decoder
        self.post_quant_conv: nn.Module | None = getattr(whole, "post_quant_conv", None)
        self.quantize: Any = getattr(whole, "quantize", None)

    def forward(self, latent: Tensor) -> Tensor:
        given = latent if self.quantize is None else nearest_codes(latent, self.quantize.embedding.weight)
        given = given if self.post_quant_conv is None else self.post_quant_conv(given)
        return self.decoder(given)


def nearest_codes(latent: Tensor, codes: Tensor) -> Tensor:
    """latent [1, C, h, w], codes [N, C] -> the nearest code at every place, [1, C, h, w].

    That of the least |z - e|^2, written as that of the most 2 z e - |e|^2: diffusers takes the root of the whole and
    the place of its minimum, by operations that few runtimes have.
    """
    places = latent.permute(0, 2, 3, 1).flatten(0, 2)
    nearness = 2.0 * places @ codes.t() - (codes * codes).sum(dim=1)
    found = F.embedding(torch.argmax(nearness, dim=1), codes)
    return found.reshape(latent.shape[0], *latent.shape[2:], -1).permute(0, 3, 1, 2)
