"""Video decoder of Turbo-VAED (arXiv 2508.09136): the LTX-Video decoder made small for phones.

Parameter names and arithmetic are those of `TurboVAEDDecoder3d` (github.com/hustvl/Turbo-VAED,
`autoencoder_kl_turbo_vaed.py`, with `configs/Turbo-VAED-LTX.json`), read and not copied. Frames are the batch
everywhere, so no tensor has more than four axes and no runtime needs a 3-D convolution:

- a convolution over k frames is the sum of k convolutions in the plane, each over the frames moved by one;
- the temporal half of the pixel shuffle is an order of the convolution's output channels, so it costs nothing;
- the batch norm has constants for its statistics.

The weights stay in the shapes that they have upstream; what is taken apart of them folds into constants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from edgegen.students.networks.channel_norm import ChannelLayerNorm, channel_rms_norm


class VideoDecoderConfig(BaseModel):
    """Shape of the decoder; field names and order (from the picture inwards) are those of the public configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent_channels: int = 128
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64, 128, 256, 512)
    layers_per_block: tuple[int, ...] = (3, 2, 3, 1, 1)
    spatio_temporal_scaling: tuple[bool, ...] = (True, True, True, False)
    is_dw_conv: tuple[bool, ...] = (False, False, False, True, True)
    dw_kernel_size: int = 5
    crop: tuple[int, int] | None = None
    """Rows and columns of the picture that are kept, where the latent's grid is larger."""

    @model_validator(mode="after")
    def _levels(self) -> VideoDecoderConfig:
        levels = len(self.block_out_channels)
        if len(self.spatio_temporal_scaling) != levels or len(self.layers_per_block) != levels + 1:
            raise ValueError("one entry of `spatio_temporal_scaling` a level, and one of `layers_per_block` more")
        if len(self.is_dw_conv) != levels + 1 or self.dw_kernel_size % 2 == 0:
            raise ValueError("`is_dw_conv` has one entry more than there are levels; `dw_kernel_size` is odd")
        if self.block_out_channels[0] % 16:
            raise ValueError("the outermost channels are shuffled into 4 x 4 pixels: a multiple of 16")
        return self


def conv_over_frames(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """`conv3d` of frames `x` [T, C, H, W] by `weight` [O, C / groups, k, k, k]: zeros around the picture, the first and
    the last frame repeated before and after; T, H and W stay."""
    frames, taps = x.shape[0], weight.shape[2]
    reach, padding = taps // 2, weight.shape[-1] // 2
    padded = torch.cat([x[:1]] * reach + [x] + [x[-1:]] * reach) if reach else x
    total = F.conv2d(padded[:frames], weight[:, :, 0], bias, padding=padding, groups=groups)
    for tap in range(1, taps):
        total = total + F.conv2d(padded[tap : tap + frames], weight[:, :, tap], padding=padding, groups=groups)
    return total


class VideoConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return conv_over_frames(x, self.conv.weight, self.conv.bias)


class SeparableVideoConv(nn.Module):
    """A k x k x k convolution a channel, then one of 1 x 1 x 1 that mixes them."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv3d(in_channels, in_channels, kernel_size, groups=in_channels)
        self.pointwise_conv = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        depth, point = self.depthwise_conv, self.pointwise_conv
        x = conv_over_frames(x, depth.weight, depth.bias, groups=depth.groups)
        return conv_over_frames(x, point.weight, point.bias)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | None, relu: bool = False) -> None:
        """Separable convolutions of `kernel_size`, or whole ones of 3 without; `relu` before the first."""
        super().__init__()
        self.relu = relu

        def conv(inner: int, outer: int, size: int) -> nn.Module:
            return VideoConv(inner, outer, size) if kernel_size is None else SeparableVideoConv(inner, outer, size)

        self.conv1 = conv(in_channels, out_channels, kernel_size or 3)
        self.conv2 = conv(out_channels, out_channels, kernel_size or 3)
        self.norm3 = ChannelLayerNorm(in_channels) if in_channels != out_channels else None
        self.conv_shortcut = conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = channel_rms_norm(x)
        h = self.conv1(F.relu(h) if self.relu else F.silu(h))
        h = self.conv2(F.silu(channel_rms_norm(h)))
        if self.norm3 is not None and self.conv_shortcut is not None:
            x = self.conv_shortcut(self.norm3(x))
        return x + h


class Upsampler(nn.Module):
    """Decoupled 3-D pixel shuffle: twice the frames, then twice the side; the first of all frames is dropped."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        frames, _, height, width = x.shape
        # Upstream a channel's index ends in the frame that it belongs to; here it begins with it, and [T, 2 x 4C] is
        # [2T, 4C] as it lies in memory.
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        weight = weight.reshape(-1, 2, *weight.shape[1:]).transpose(0, 1).flatten(0, 1)
        y = conv_over_frames(x, weight, bias.reshape(-1, 2).transpose(0, 1).flatten())
        y = y.reshape(frames * 2, bias.numel() // 2, height, width)
        return F.pixel_shuffle(y[1:], 2)


class MidBlock(nn.Module):
    def __init__(self, channels: int, layers: int, kernel_size: int | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, kernel_size) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, up: bool, kernel_size: int | None) -> None:
        super().__init__()
        widens = in_channels != out_channels
        self.conv_in = ResnetBlock(in_channels, out_channels, kernel_size) if widens else None
        self.upsamplers = nn.ModuleList([Upsampler(out_channels)]) if up else None
        self.resnets = nn.ModuleList(
            [ResnetBlock(out_channels, out_channels, kernel_size, relu=up) for _ in range(layers)]
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.conv_in is not None:
            x = self.conv_in(x)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x)
        for resnet in self.resnets:
            x = resnet(x)
        return x


class PixelUpsampler(nn.Module):
    """Twice the side within each frame; a quarter of the channels is left."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class FixedBatchNorm(nn.Module):
    """A batch norm without weights, by the statistics of training."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(self.running_var + self.eps)
        shift = -self.running_mean * scale
        return x * scale[None, :, None, None] + shift[None, :, None, None]


class VideoDecoder(nn.Module):
    """Decoder: latent [1, C, T, H, W] -> video [1, 3, 8T - 7, 32H, 32W] in -1..1 (not clamped), cut to `crop`.

    The factors are for three levels that scale: 2^levels in time, 4 * 2^levels in space.
    """

    def __init__(self, config: VideoDecoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = tuple(reversed(config.block_out_channels))
        layers = tuple(reversed(config.layers_per_block))
        kernels = [config.dw_kernel_size if separable else None for separable in reversed(config.is_dw_conv)]
        scales = tuple(reversed(config.spatio_temporal_scaling))
        self.conv_in = VideoConv(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], layers[0], kernels[0])
        channels = widths[0]
        self.up_blocks = nn.ModuleList()
        for width, count, scale, kernel in zip(widths, layers[1:], scales, kernels[1:], strict=True):
            self.up_blocks.append(UpBlock(channels, width, count, scale, kernel))
            channels = width
        self.upsampler2d_1 = PixelUpsampler(channels)
        self.upsampler2d_2 = PixelUpsampler(channels // 4)
        self.norm_out = FixedBatchNorm(channels // 16)
        self.conv_out = VideoConv(channels // 16, config.out_channels)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latent.reshape(latent.shape[1:]).transpose(0, 1)))
        for block in self.up_blocks:
            x = block(x)
        x = self.upsampler2d_1(F.silu(channel_rms_norm(x)))
        x = self.upsampler2d_2(F.silu(channel_rms_norm(x)))
        x = self.conv_out(F.silu(self.norm_out(x)))
        if self.config.crop is not None:
            x = x[:, :, : self.config.crop[0], : self.config.crop[1]]
        x = x.transpose(0, 1)
        return x.reshape(1, *x.shape)
