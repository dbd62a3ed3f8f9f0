"""Image encoder of LTX-Video (arXiv 2501.00103): its video encoder, for one frame.

The encoder is causal in time and repeats the first frame before it, so over a single frame every 3-D convolution sees
three times the same picture and equals a 2-D one whose kernel is the sum of the three. `collapse` takes a state dict of
diffusers' `AutoencoderKLLTXVideo` (the 0.9.0 layout, whose downsampling is a strided convolution; the one that can
halve 45 rows) to these names, which are the same. A third of the MACs are left.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from edgegen.students.networks.channel_norm import ChannelLayerNorm, channel_rms_norm


class VideoEncoderConfig(BaseModel):
    """Shape of the encoder; the field names are those of diffusers' `config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: int = 3
    latent_channels: int = 128
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: tuple[int, ...] = (4, 3, 3, 3, 4)
    spatio_temporal_scaling: tuple[bool, ...] = (True, True, True, False)
    patch_size: int = 4
    scaling_factor: float = 1.0

    @model_validator(mode="after")
    def _levels(self) -> VideoEncoderConfig:
        levels = len(self.block_out_channels)
        if len(self.spatio_temporal_scaling) != levels or len(self.layers_per_block) != levels + 1:
            raise ValueError("one entry of `spatio_temporal_scaling` a level, and one of `layers_per_block` more")
        return self


class ImageConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PatchConv(nn.Module):
    """A 3x3 convolution over patches of p x p pixels, as one of 3p x 3p over the pixels with stride p."""

    def __init__(self, in_channels: int, out_channels: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.conv = nn.Conv2d(in_channels * patch * patch, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        patch = self.patch
        # Channels of a patch are (colour, column, row), columns before rows as upstream orders them.
        outputs = self.conv.weight.shape[0]
        kernel = self.conv.weight.reshape(outputs, -1, patch, patch, 3, 3)  # [O, colour, column, row, 3, 3]
        kernel = kernel.permute(0, 1, 4, 3, 5, 2).flatten(4, 5).flatten(2, 3)
        return F.conv2d(x, kernel, self.conv.bias, stride=patch, padding=patch)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ImageConv(in_channels, out_channels)
        self.conv2 = ImageConv(out_channels, out_channels)
        self.norm3 = ChannelLayerNorm(in_channels) if in_channels != out_channels else None
        self.conv_shortcut = ImageConv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(channel_rms_norm(x)))
        h = self.conv2(F.silu(channel_rms_norm(h)))
        if self.norm3 is not None and self.conv_shortcut is not None:
            x = self.conv_shortcut(self.norm3(x))
        return x + h


class DownBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, down: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(in_channels, in_channels) for _ in range(layers)])
        self.downsamplers = nn.ModuleList([ImageConv(in_channels, in_channels, stride=2)]) if down else None
        self.conv_out = ResnetBlock(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
        return x if self.conv_out is None else self.conv_out(x)


class MidBlock(nn.Module):
    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class VideoEncoder(nn.Module):
    """Image encoder: image [1, 3, H, W] in -1..1 -> image_latent [1, C, 1, H / 32, W / 32], rounded up.

    The latent is the mean of the posterior times `scaling_factor`, in the scale of the denoiser.
    """

    def __init__(self, config: VideoEncoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = PatchConv(config.in_channels, widths[0], config.patch_size)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            next_width = widths[min(level + 1, len(widths) - 1)]
            down = config.spatio_temporal_scaling[level]
            self.down_blocks.append(DownBlock(width, next_width, config.layers_per_block[level], down))
        self.mid_block = MidBlock(widths[-1], config.layers_per_block[-1])
        self.conv_out = ImageConv(widths[-1], config.latent_channels)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        x = self.conv_out(F.silu(channel_rms_norm(self.mid_block(x))))
        x = x * self.config.scaling_factor
        return x.reshape(*x.shape[:2], 1, *x.shape[2:])


def collapse(state: Mapping[str, Tensor], latent_channels: int) -> dict[str, Tensor]:
    """Weights of diffusers' `LTXVideoEncoder3d` as `VideoEncoder` has them: kernels summed over time, and without the
    channel of the posterior's variance, which is after the `latent_channels` of its mean."""
    taken = {name: value.sum(dim=2) if value.dim() == 5 else value for name, value in state.items()}
    for name in ("conv_out.conv.weight", "conv_out.conv.bias"):
        if name in taken:
            taken[name] = taken[name][:latent_channels].clone()
    return taken
