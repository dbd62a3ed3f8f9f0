"""Tiny autoencoder of TAESD (github.com/madebyollin/taesd): convolutions and ReLU only, no norms.

Parameter names and arithmetic are those of diffusers' `AutoencoderTiny`, so a state dict moves either way. The
decoder is
a component of a student; the encoder serves training alone.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class TinyDecoderConfig(BaseModel):
    """Shape of the decoder. It doubles the picture's side once for each entry of `num_blocks` but the last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent_channels: int = 4
    out_channels: int = 3
    width: int = 64
    num_blocks: tuple[int, ...] = (3, 3, 3, 1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.skip = nn.Identity()
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + self.skip(x))


class TinyDecoder(nn.Module):
    """Decoder: latent [B, C, h, w] -> image [B, 3, H, W] in -1..1 (not clamped).

    The latent is squashed by tanh(x / 3) * 3 first, as TAESD does, which bounds what a stray denoiser can feed it.
    """

    def __init__(self, config: TinyDecoderConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, config.width, 3, padding=1), nn.ReLU()]
        for index, count in enumerate(config.num_blocks):
            last = index == len(config.num_blocks) - 1
            layers += [Block(config.width) for _ in range(count)]
            if not last:
                layers.append(nn.Upsample(scale_factor=2.0))
            layers.append(
                nn.Conv2d(config.width, config.out_channels if last else config.width, 3, padding=1, bias=last)
            )
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        x = torch.tanh(latent / 3) * 3
        for layer in self.layers:
            x = layer(x)
        return x * 2 - 1


class TinyEncoder(nn.Module):
    """Encoder for training: image [B, 3, H, W] in -1..1 -> latent [B, C, h, w]."""

    def __init__(self, config: TinyDecoderConfig) -> None:
        super().__init__()
        width = config.width
        layers: list[nn.Module] = []
        for index, count in enumerate(reversed(config.num_blocks)):
            if index == 0:
                layers.append(nn.Conv2d(config.out_channels, width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += [Block(width) for _ in range(count)]
        layers.append(nn.Conv2d(width, config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        return self.layers((image + 1) / 2)
