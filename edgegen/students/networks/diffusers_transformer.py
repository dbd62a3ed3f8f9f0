"""diffusers' diffusion transformers as denoisers: SANA(-Sprint), Stable Diffusion 3(.5-Flash), PixArt.

Z-Image's is `edgegen.students.networks.z_image`: diffusers' own forward takes lists and complex numbers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from edgegen.errors import EdgegenError
from edgegen.students.networks.upstream import Adopting, constructor_arguments, upstream_class

Transformer = Literal["SanaTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel"]


class DiffusersTransformerConfig(BaseModel):
    """`transformer` is the `config.json` of a transformer of class `class_name`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    class_name: Transformer
    transformer: dict[str, Any]
    guidance_scale: float = 4.5
    """For a SANA-Sprint with `guidance_embeds`, which is told its guidance: folded to a constant."""
    pixels: tuple[int, int] | None = None
    """For a PixArt with additional conditions: height and width of its picture."""


class DiffusersTransformer(Adopting):
    """Denoiser: latent [1, C, H, W], timestep [1], context [1, L, D] and one more -> prediction [1, C, H, W].

    The fourth input is `pooled` [1, P] for SD3 and `mask` [1, L], 1 where there is text and 0 where there is padding,
    for SANA and PixArt. Where a PixArt also predicts a variance (twice the channels), that half is dropped. SANA: Xie
    et al. 2024, arXiv 2410.10629; Sprint: Chen et al. 2025, arXiv 2503.09641; SD3: Esser et al. 2024, arXiv 2403.03206;
    PixArt: Chen et al. 2023, arXiv 2310.00426.
    """

    def __init__(self, config: DiffusersTransformerConfig) -> None:
        super().__init__()
        self.config = config
        made = upstream_class("diffusers", config.class_name)
        network = made(**constructor_arguments(made, config.transformer, config.class_name))
        self.adopt(network)
        self.channels = int(network.config.in_channels)
        self.guidance: float | None = None
        if config.class_name == "SanaTransformer2DModel" and network.config.guidance_embeds:
            self.guidance = config.guidance_scale * network.config.guidance_embeds_scale
        self.sized = bool(getattr(network, "use_additional_conditions", False))
        if self.sized and config.pixels is None:
            raise EdgegenError("a PixArt with additional conditions needs the `pixels` of its picture")

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, extra: Tensor) -> Tensor:
        if self.config.class_name == "SD3Transformer2DModel":
            return self.network(latent, context, extra, timestep, return_dict=False)[0]
        more: dict[str, Any] = {"encoder_attention_mask": extra}
        if self.guidance is not None:
            more["guidance"] = torch.tensor([self.guidance], dtype=latent.dtype, device=latent.device)
        if self.config.class_name == "PixArtTransformer2DModel":
            more["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
            if self.sized:
                assert self.config.pixels is not None
                height, width = self.config.pixels
                sizes = torch.tensor([[float(height), float(width)]], dtype=latent.dtype, device=latent.device)
                ratio = torch.tensor([[height / width]], dtype=latent.dtype, device=latent.device)
                more["added_cond_kwargs"] = {"resolution": sizes, "aspect_ratio": ratio}
        made = self.network(latent, encoder_hidden_states=context, timestep=timestep, return_dict=False, **more)[0]
        return made[:, : self.channels] if made.shape[1] != self.channels else made
