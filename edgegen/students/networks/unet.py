"""Latent denoiser: the conditional UNet of Stable Diffusion, and SDXS's variant of it without a mid block.

Parameter names and arithmetic are those of diffusers' `UNet2DConditionModel`, so a state dict moves either way; a test
holds the two networks against each other. Only what few-step students use is here: no dropout, no class embedding,
no guidance embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class UNetConfig(BaseModel):
    """Shape of the network; the field names are those of diffusers' `config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_size: int
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    cross_attention: tuple[bool, ...] = (False, True, True)
    layers_per_block: int = 1
    num_heads: int | tuple[int, ...] = 8
    """Of every level, or one number a level; diffusers calls it `attention_head_dim`."""
    cross_attention_dim: int = 768
    only_cross_attention: tuple[bool, ...] = ()
    """Levels whose self-attention reads the context too; empty: none."""
    use_linear_projection: bool = False
    """Projections around a transformer are linear layers, as in SD 2, not 1x1 convolutions; the arithmetic is equal."""
    norm_num_groups: int = 32
    coordinates: bool = False
    """Two constant input channels, x and y in -1..1, beside the latent (CoordConv, arXiv 1807.03247): a small network
    without a mid block takes very long to learn from its zero padding alone which side is left."""


class TimeEmbedding(nn.Module):
    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


def timestep_features(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoidal features of `timestep` [B] -> [B, channels], cosines first, always computed in fp32.

    The arguments reach 1000 rad: half precision there is noise, so the caller casts the result, not the argument.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=timestep.device))
    angles = timestep.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, time_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def _split(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        # Heads are counted, not remembered: a pruned network has fewer.
        return x.view(batch, length, dim // self.head_dim, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(context)), self._split(self.to_v(context))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        # Index 1 is diffusers' dropout: kept as an empty place so that the names of the weights agree.
        self.net = nn.ModuleList([GEGLU(dim, dim * ratio), nn.Identity(), nn.Linear(dim * ratio, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int, only_cross: bool = False) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, context_dim if only_cross else dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, context if self.only_cross else h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


@dataclass(frozen=True)
class TransformerShape:
    """What the transformers of one level have in common."""

    context_dim: int
    heads: int
    only_cross: bool = False
    linear: bool = False


class SpatialTransformer(nn.Module):
    """diffusers' `Transformer2DModel` with one block."""

    def __init__(self, channels: int, shape: TransformerShape, groups: int) -> None:
        super().__init__()
        self.linear = shape.linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if shape.linear else nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, shape.context_dim, shape.heads, shape.only_cross)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Linear(channels, channels) if shape.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        h = self.norm(x)
        h = self.proj_in(h.flatten(2).transpose(1, 2)) if self.linear else self.proj_in(h).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).reshape(batch, h.shape[2], height, width)
        return x + (h if self.linear else self.proj_out(h))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One level of a UNet: residual blocks, a transformer after each where there are any, then a resampler."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module] | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = None if attentions is None else nn.ModuleList(attentions)
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def layer(self, index: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[index](x, time)
        return x if self.attentions is None else self.attentions[index](x, context)


def through_levels(
    down: nn.ModuleList, middle: nn.Module | None, up: nn.ModuleList, x: Tensor, time: Tensor, context: Tensor
) -> Tensor:
    """Down the levels and up again, each block of the way up beside what the way down left for it."""
    skips = [x]
    for level in down:
        assert isinstance(level, Level)
        for i in range(len(level.resnets)):
            x = level.layer(i, x, time, context)
            skips.append(x)
        if level.downsamplers is not None:
            x = level.downsamplers[0](x)
            skips.append(x)
    if middle is not None:
        x = middle(x, time, context)
    for level in up:
        assert isinstance(level, Level)
        for i in range(len(level.resnets)):
            x = level.layer(i, torch.cat([x, skips.pop()], dim=1), time, context)
        if level.upsamplers is not None:
            x = level.upsamplers[0](x)
    return x


class Stage(Level):
    """A level of the UNet; it has attention where `attention` is given."""

    def __init__(
        self,
        resnet_channels: Sequence[tuple[int, int]],
        time_dim: int,
        groups: int,
        attention: TransformerShape | None,
    ) -> None:
        super().__init__(
            [ResnetBlock(i, o, time_dim, groups) for i, o in resnet_channels],
            None if attention is None else [SpatialTransformer(o, attention, groups) for _, o in resnet_channels],
        )


class UNet(nn.Module):
    """Denoiser: (latent [B, C, H, W], timestep [B], context [B, L, D]) -> prediction [B, C, H, W].

    Follows Rombach et al. 2022 (arXiv 2112.10752) without a mid block, as SDXS does (arXiv 2403.16627).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, groups = config.block_out_channels, config.norm_num_groups
        time_dim = widths[0] * 4
        self.coordinates: Tensor | None
        if config.coordinates:
            axis = (torch.arange(config.sample_size) + 0.5) / config.sample_size * 2 - 1
            grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None]
            self.register_buffer("coordinates", grid, persistent=False)
        else:
            self.coordinates = None
        extra = 2 if config.coordinates else 0
        self.conv_in = nn.Conv2d(config.in_channels + extra, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], time_dim)

        def attention(level: int) -> TransformerShape | None:
            if not config.cross_attention[level]:
                return None
            heads = config.num_heads if isinstance(config.num_heads, int) else config.num_heads[level]
            only_cross = config.only_cross_attention[level] if config.only_cross_attention else False
            return TransformerShape(config.cross_attention_dim, heads, only_cross, config.use_linear_projection)

        skips, channels = [widths[0]], widths[0]
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            pairs = [(channels if i == 0 else width, width) for i in range(config.layers_per_block)]
            stage = Stage(pairs, time_dim, groups, attention(level))
            skips += [width] * config.layers_per_block
            if level < len(widths) - 1:
                stage.downsamplers = nn.ModuleList([Downsample(width)])
                skips.append(width)
            self.down_blocks.append(stage)
            channels = width
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            width, pairs = widths[level], []
            for _ in range(config.layers_per_block + 1):
                pairs.append((channels + skips.pop(), width))
                channels = width
            stage = Stage(pairs, time_dim, groups, attention(level))
            if level > 0:
                stage.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(stage)
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        features = timestep_features(timestep, self.config.block_out_channels[0])
        time = self.time_embedding(features.to(latent.dtype))
        x = latent
        if self.coordinates is not None:
            grid = self.coordinates.to(latent.dtype).expand(latent.shape[0], -1, -1, -1)
            x = torch.cat([latent, grid], dim=1)
        x = through_levels(self.down_blocks, None, self.up_blocks, self.conv_in(x), time, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
