"""SnapGen's denoiser (arXiv 2412.09619): a UNet of separable convolutions and multi-query attention.

Parameter names and arithmetic are those of diffusers' `DreamLiteUNetModel` (DreamLite, arXiv 2603.28713, took over
SnapGen's UNet), so a state dict of its class moves either way; rotary positions, which SnapGen's paper has and that
class has not, add no parameters.
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from edgegen.students.networks.rotary import rotary_tables, rotate
from edgegen.students.networks.separable_conv import SeparableConv
from edgegen.students.networks.unet import (
    Downsample,
    FeedForward,
    Level,
    TimeEmbedding,
    Upsample,
    through_levels,
    timestep_features,
)


class SnapGenUNetConfig(BaseModel):
    """Shape of the network, from the highest resolution to the lowest; self-attention is at the lowest one alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_size: int
    in_channels: int = 16
    out_channels: int = 16
    block_out_channels: tuple[int, ...] = (256, 512, 896)
    down_transformer_layers: tuple[int, ...] = (1, 2, 4)
    """After each residual block of a level; 0: the level has none."""
    up_transformer_layers: tuple[int, ...] = (0, 2, 4)
    num_heads: tuple[int, ...] = (4, 8, 14)
    layers_per_block: int = 2
    cross_attention_dim: int = 2304
    ff_ratio: int = 3
    expansion: int = 2
    norm_num_groups: int = 32
    rotary: bool = True


class SeparableResnetBlock(nn.Module):
    """norm, SiLU, separable conv to `expansion` times the width, time; norm, SiLU, separable conv back; skip."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, config: SnapGenUNetConfig) -> None:
        super().__init__()
        inner = out_channels * config.expansion
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, eps=1e-5)
        self.conv1 = SeparableConv(in_channels, inner)
        self.time_emb_proj = nn.Linear(time_dim, inner)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, inner, eps=1e-5)
        self.conv2 = SeparableConv(inner, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class MultiQueryAttention(nn.Module):
    """Attention whose heads share one key and one value (Shazeer 2019, arXiv 1911.02150), queries and keys normed."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, self.head_dim, bias=False)
        self.to_v = nn.Linear(context_dim, self.head_dim, bias=False)
        self.norm_q = nn.RMSNorm(self.head_dim, eps=1e-5)
        self.norm_k = nn.RMSNorm(self.head_dim, eps=1e-5)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
        batch, length, _ = x.shape
        q = self.to_q(x)
        heads = q.shape[2] // self.head_dim
        # Heads are normed as further rows: XNNPACK under TFLite takes no linear over four axes, which the mean becomes.
        q = self.norm_q(q.view(batch, length * heads, self.head_dim))
        q = q.view(batch, length, heads, self.head_dim).transpose(1, 2)
        one = (batch, 1, context.shape[1], self.head_dim)
        k, v = self.norm_k(self.to_k(context)).view(one), self.to_v(context).view(one)
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        k, v = (shared.expand(-1, heads, -1, -1) for shared in (k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.transpose(1, 2).reshape(batch, length, heads * self.head_dim))


class SnapGenTransformerBlock(nn.Module):
    """Self-attention where the level has it, cross-attention, feed-forward.

    Without self-attention its norm stays, on the residual path itself: DreamLite's code has it so.
    """

    def __init__(self, dim: int, heads: int, self_attention: bool, config: SnapGenUNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = MultiQueryAttention(dim, dim, heads) if self_attention else None
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = MultiQueryAttention(dim, config.cross_attention_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, config.ff_ratio)

    def forward(self, x: Tensor, context: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        h = self.norm1(x)
        x = h if self.attn1 is None else x + self.attn1(h, h, tables)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SnapGenTransformer(nn.Module):
    """Norm, linear projection, `depth` blocks over the picture's tokens, linear projection, skip."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, level: int, depth: int, config: SnapGenUNetConfig) -> None:
        super().__init__()
        channels, heads = config.block_out_channels[level], config.num_heads[level]
        lowest = level == len(config.block_out_channels) - 1
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [SnapGenTransformerBlock(channels, heads, lowest, config) for _ in range(depth)]
        )
        self.proj_out = nn.Linear(channels, channels)
        self.rotary = config.rotary and lowest
        if self.rotary:
            side = config.sample_size >> level
            cosines, sines = rotary_tables(side, side, channels // heads)
            self.register_buffer("cosines", cosines, persistent=False)
            self.register_buffer("sines", sines, persistent=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tables = (self.cosines, self.sines) if self.rotary else None
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            h = block(h, context, tables)
        return x + self.proj_out(h).transpose(1, 2).reshape(batch, channels, height, width)


class SnapGenStage(Level):
    """A level of the UNet; it has transformers where `depth` is not 0."""

    def __init__(self, pairs: list[tuple[int, int]], level: int, depth: int, config: SnapGenUNetConfig) -> None:
        time_dim = config.block_out_channels[0] * 4
        super().__init__(
            [SeparableResnetBlock(i, o, time_dim, config) for i, o in pairs],
            [SnapGenTransformer(level, depth, config) for _ in pairs] if depth else None,
        )


class SnapGenMiddle(nn.Module):
    """Residual block, transformer with self-attention, residual block, at the lowest resolution."""

    def __init__(self, config: SnapGenUNetConfig) -> None:
        super().__init__()
        width, time_dim = config.block_out_channels[-1], config.block_out_channels[0] * 4
        self.resnets = nn.ModuleList([SeparableResnetBlock(width, width, time_dim, config) for _ in range(2)])
        level, depth = len(config.block_out_channels) - 1, config.down_transformer_layers[-1]
        self.attentions = nn.ModuleList([SnapGenTransformer(level, depth, config)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class SnapGenUNet(nn.Module):
    """Denoiser: (latent [B, C, H, W], timestep [B], context [B, L, D]) -> velocity [B, C, H, W].

    SnapGen, arXiv 2412.09619: separable convolutions with expansion 2, self-attention at the lowest resolution only,
    one key and value head, RMSNorm on queries and keys, rotary positions, feed-forward ratio 3.
    """

    def __init__(self, config: SnapGenUNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, count = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], widths[0] * 4)
        skips, channels = [widths[0]], widths[0]
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            pairs = [(channels if i == 0 else width, width) for i in range(count)]
            stage = SnapGenStage(pairs, level, config.down_transformer_layers[level], config)
            skips += [width] * count
            if level < len(widths) - 1:
                stage.downsamplers = nn.ModuleList([Downsample(width)])
                skips.append(width)
            self.down_blocks.append(stage)
            channels = width
        self.mid_block = SnapGenMiddle(config)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            width, pairs = widths[level], []
            for _ in range(count + 1):
                pairs.append((channels + skips.pop(), width))
                channels = width
            stage = SnapGenStage(pairs, level, config.up_transformer_layers[level], config)
            if level > 0:
                stage.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(stage)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        features = timestep_features(timestep, self.config.block_out_channels[0])
        time = self.time_embedding(features.to(latent.dtype))
        x = through_levels(self.down_blocks, self.mid_block, self.up_blocks, self.conv_in(latent), time, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
