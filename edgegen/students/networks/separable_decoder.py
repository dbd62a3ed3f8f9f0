"""SnapGen's tiny decoder (arXiv 2412.09619, section on the decoder): convolutions only, nearly without norms.

From the paper: no attention, as few norms as train, narrow separable convolutions, fewer residual blocks where the
resolution is high, no 1x1 shortcuts, so that the upsampling changes the width. Widths, counts of blocks and where the
norms stand are this file's reading. No weights are public: the parameter names are ours.
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from edgegen.students.networks.separable_conv import SeparableConv


class SeparableDecoderConfig(BaseModel):
    """Shape of the decoder, from the latent to the picture; the side doubles between entries of `widths`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent_channels: int = 16
    widths: tuple[int, ...] = (256, 256, 128, 64)
    num_blocks: tuple[int, ...] = (4, 4, 3, 2)
    norm_num_groups: int = 32
    out_channels: int = 3


class SeparableBlock(nn.Module):
    """SiLU, separable conv, SiLU, separable conv, skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = SeparableConv(width, width)
        self.conv2 = SeparableConv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class SeparableLevel(nn.Module):
    """One GroupNorm, `count` blocks, and the way up to `next_width` channels unless this is the last level."""

    def __init__(self, width: int, count: int, next_width: int | None, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.blocks = nn.ModuleList([SeparableBlock(width) for _ in range(count)])
        self.up = None if next_width is None else SeparableConv(width, next_width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        return x if self.up is None else self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class SeparableDecoder(nn.Module):
    """Decoder: latent [B, C, h, w] -> image [B, 3, H, W] in -1..1 (not clamped)."""

    def __init__(self, config: SeparableDecoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            [
                SeparableLevel(width, count, following, config.norm_num_groups)
                for width, count, following in zip(widths, config.num_blocks, (*widths[1:], None), strict=True)
            ]
        )
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.conv_in(latent)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(x))
