"""diffusers' `UNet2DConditionModel` with any of its configurations, as a denoiser: SD-Turbo, SDXL-Turbo and -Lightning,
LCM, Hyper-SD, DMD2.

`edgegen.students.networks.unet` is the same network for the configurations that it covers, and is used for those.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from edgegen.errors import EdgegenError
from edgegen.students.networks.upstream import Adopting, constructor_arguments, upstream_class

CLASS = "UNet2DConditionModel"
ABSENT: dict[str, tuple[Any, ...]] = {
    # Settings that make the network ask for more than a latent, a time and a text.
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
}


class DiffusersUNetConfig(BaseModel):
    """`unet` is diffusers' own `config.json`; the rest is what a pipeline gives it beside latent, time and text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unet: dict[str, Any]
    guidance_scale: float = 1.0
    """For a network with `time_cond_proj_dim`, which is told its guidance: folded to a constant."""
    time_ids: tuple[float, ...] = ()
    """For SDXL (`addition_embed_type` text_time): original height and width, top and left of the crop, target height
    and width, in pixels."""


class DiffusersUNet(Adopting):
    """Denoiser: latent [1, C, H, W], timestep [1], context [1, L, D], SDXL: pooled [1, P] -> prediction [1, C, H, W].

    Guidance and SDXL's sizes are constants. EdgegenError for a setting that asks for other inputs, or that the
    installed diffusers does not have. SDXL: Podell et al. 2023, arXiv 2307.01952; the guidance embedding: Luo et al.
    2023, arXiv 2310.04378, appendix.
    """

    def __init__(self, config: DiffusersUNetConfig) -> None:
        super().__init__()
        self.config = config
        for key, allowed in ABSENT.items():
            if config.unet.get(key, allowed[0]) not in allowed:
                raise EdgegenError(f"`{key}` of the UNet is {config.unet[key]!r}: a student has nothing to give it")
        made = upstream_class("diffusers", CLASS)
        network: nn.Module = made(**constructor_arguments(made, config.unet, CLASS))
        self.adopt(network)
        width = config.unet.get("time_cond_proj_dim")
        self.guidance = None if width is None else guidance_embedding(config.guidance_scale, width)
        self.sizes = None
        if config.unet.get("addition_embed_type") == "text_time":
            if len(config.time_ids) != 6:
                raise EdgegenError("a UNet with `addition_embed_type` text_time needs six `time_ids`")
            self.sizes = config.time_ids

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor | None = None) -> Tensor:
        more: dict[str, Any] = {}
        if self.guidance is not None:
            more["timestep_cond"] = torch.tensor([self.guidance], dtype=latent.dtype, device=latent.device)
        if self.sizes is not None:
            sizes = torch.tensor([self.sizes], dtype=latent.dtype, device=latent.device)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.expand(latent.shape[0], -1)}
        return self.network(latent, timestep, encoder_hidden_states=context, return_dict=False, **more)[0]


def guidance_embedding(scale: float, width: int) -> tuple[float, ...]:
    """Sines, then cosines, of 1000 (scale - 1) at `width` / 2 falling frequencies, as diffusers' pipelines do."""
    half = width // 2
    frequencies = [math.exp(-math.log(10000.0) * i / (half - 1)) for i in range(half)]
    angles = [(scale - 1.0) * 1000.0 * frequency for frequency in frequencies]
    return (*(math.sin(a) for a in angles), *(math.cos(a) for a in angles), *([0.0] * (width % 2)))
