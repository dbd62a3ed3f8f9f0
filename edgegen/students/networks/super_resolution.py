"""Super-resolution by latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 4.4): diffusers' `UNet2DModel`
whose first convolution sees the latent and the small picture side by side.

A convolution over two inputs side by side is the sum of one over each. The picture does not change from step to step,
so its half is a network of its own that runs once, `PictureFeatures`, and the denoiser adds what it gives.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from edgegen.errors import EdgegenError
from edgegen.students.networks.upstream import Adopting, constructor_arguments, upstream_class

CLASS = "UNet2DModel"
ABSENT: dict[str, tuple[Any, ...]] = {
    # Settings that make the network ask for more than a latent and a time, or look at the picture a second time.
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
}


class PictureFeaturesConfig(BaseModel):
    """`width` is the UNet's first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(ge=1, le=1 << 16)


class PictureFeatures(nn.Module):
    """Image encoder: image [1, 3, h, w] in -1..1 -> features [1, width, h, w]."""

    def __init__(self, config: PictureFeaturesConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv_in(image)


class SuperResolutionUNetConfig(BaseModel):
    """`unet` is diffusers' own `config.json`, whose `in_channels` are the latent's and three of a picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unet: dict[str, Any]


class SuperResolutionUNet(Adopting):
    """Denoiser: latent [1, C, h, w], timestep [1], features [1, width, h, w] -> prediction [1, C, h, w].

    EdgegenError for a setting that asks for other inputs, or that the installed diffusers does not have.
    """

    def __init__(self, config: SuperResolutionUNetConfig) -> None:
        super().__init__()
        self.config = config
        for key, allowed in ABSENT.items():
            if config.unet.get(key, allowed[0]) not in allowed:
                raise EdgegenError(f"`{key}` of the UNet is {config.unet[key]!r}: a student has nothing to give it")
        made = upstream_class("diffusers", CLASS)
        given = constructor_arguments(made, config.unet, CLASS)
        given["in_channels"] = given.get("in_channels", 6) - 3
        self.adopt(made(**given))

    def forward(self, latent: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        joined = self.network.conv_in.register_forward_hook(lambda conv, given, out: out + features)
        try:
            return self.network(latent, timestep, return_dict=False)[0]
        finally:
            joined.remove()


def halves(state: dict[str, Tensor], latent_channels: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict of the whole `UNet2DModel` -> that of `PictureFeatures` and that of `SuperResolutionUNet`."""
    weight = state["conv_in.weight"]
    picture = {"conv_in.weight": weight[:, latent_channels:].contiguous()}
    return picture, {**state, "conv_in.weight": weight[:, :latent_channels].contiguous()}
