"""SnapGen++'s denoiser (arXiv 2601.08303): a diffusion transformer in three stages with sparse attention.

    picture -> patches -> down blocks -> half the side -> middle blocks -> twice the side -> up blocks -> picture

Down and up blocks have adaptive sparse self-attention: every head mixes attention to keys and values compressed four
times with attention to neighbouring rows of tokens. No weights are public: the parameter names are ours.
`edgegen.students.families.snapgenpp` lists which details are from the paper and which are a reading.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from edgegen.students.networks.rotary import rotary_tables, rotate
from edgegen.students.networks.unet import TimeEmbedding, timestep_features

TIME_CHANNELS = 256
Tables = tuple[Tensor, Tensor]


class SnapGenPlusConfig(BaseModel):
    """Shape of the network. The head width is fixed, so a narrower network of the family has fewer heads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_size: int
    in_channels: int = 16
    patch_size: int = 2
    hidden_size: int = 1024
    head_dim: int = 64
    kv_group: int = 2
    """Query heads that share one key and one value in self-attention."""
    depths: tuple[int, int, int] = (8, 10, 10)
    """Blocks of the down, middle and up stage."""
    ff_ratios: tuple[int, int, int] = (4, 3, 4)
    cross_attention_dim: int = 768
    num_blocks: int = 16
    """Blocks of consecutive tokens that local attention cuts a picture into; at least 2."""
    radius: int = 1
    """How many blocks to either side a token attends to."""


class GroupedAttention(nn.Module):
    """Queries, keys and values of `heads`, `group` of which share a key and a value; queries and keys are normed."""

    def __init__(self, dim: int, context_dim: int, head_dim: int, group: int) -> None:
        super().__init__()
        self.head_dim, self.group = head_dim, group
        self.heads = dim // head_dim
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(context_dim, dim // group)
        self.to_v = nn.Linear(context_dim, dim // group)
        self.norm_q = nn.LayerNorm(head_dim)
        self.norm_k = nn.LayerNorm(head_dim)
        self.to_out = nn.Linear(dim, dim)

    def project(self, x: Tensor, context: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, L, D], k and v [B, H / group, S, D]."""

        def split(h: Tensor, norm: nn.Module | None) -> Tensor:
            # Heads are normed as further rows: XNNPACK under TFLite takes no linear over four axes.
            batch, length, dim = h.shape
            if norm is not None:
                h = norm(h.view(batch, -1, self.head_dim))
            return h.reshape(batch, length, dim // self.head_dim, self.head_dim).transpose(1, 2)

        q, k = split(self.to_q(x), self.norm_q), split(self.to_k(context), self.norm_k)
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        return q, k, split(self.to_v(context), None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.group > 1:
            k, v = (shared.repeat_interleave(self.group, dim=1) for shared in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor, context: Tensor, tables: Tables | None = None) -> Tensor:
        out = self.attend(*self.project(x, context, tables))
        return self.to_out(out.transpose(1, 2).flatten(2))


class SparseAttention(GroupedAttention):
    """Adaptive sparse self-attention over a grid of tokens, row by row.

    Global: keys and values compressed by a 2x2 convolution of stride 2, each head its own. Local: the tokens are cut
    into blocks of whole rows, and a block attends to itself and its neighbours. A gate of the input, one number a head
    and token, mixes the two.
    """

    def __init__(self, config: SnapGenPlusConfig) -> None:
        dim = config.hidden_size
        super().__init__(dim, dim, config.head_dim, config.kv_group)
        self.side = config.sample_size // config.patch_size
        self.num_blocks, self.radius = config.num_blocks, config.radius
        shared = dim // config.kv_group
        heads = shared // config.head_dim
        self.compress_k = nn.Conv2d(shared, shared, 2, stride=2, groups=heads)
        self.compress_v = nn.Conv2d(shared, shared, 2, stride=2, groups=heads)
        self.gate = nn.Linear(dim, self.heads)

    def _compress(self, conv: nn.Module, h: Tensor) -> Tensor:
        batch, heads, _, _ = h.shape
        picture = h.transpose(2, 3).reshape(batch, heads * self.head_dim, self.side, self.side)
        small = conv(picture)
        return small.reshape(batch, heads, self.head_dim, -1).transpose(2, 3)

    def _neighbourhood(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Blocks in the middle have neighbourhoods of one length and go through one call; the ends see fewer."""
        length, count, radius = q.shape[2] // self.num_blocks, self.num_blocks, self.radius
        inner = max(0, count - 2 * radius)
        ends = [block for block in range(count) if not inner or block < radius or block >= count - radius]
        outputs = {}
        for block in ends:
            low, high = max(0, block - radius) * length, (block + radius + 1) * length
            rows = slice(block * length, (block + 1) * length)
            outputs[block] = self.attend(q[:, :, rows], k[:, :, low:high], v[:, :, low:high])
        if inner:
            outputs[radius] = self._together(q, k, v, length)
        return torch.cat([outputs[block] for block in sorted(outputs)], dim=2)

    def _together(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """Every block with a whole neighbourhood, each as further heads: at most four axes everywhere."""
        batch, shared, _, dim = k.shape
        inner = self.num_blocks - 2 * self.radius
        middle = q[:, :, self.radius * length : (self.radius + inner) * length]
        asked = middle.reshape(batch * shared, self.group, inner, length * dim).transpose(1, 2)

        def windows(h: Tensor) -> Tensor:
            blocks = h.reshape(batch * shared, self.num_blocks, length * dim)
            near = torch.cat([blocks[:, start : start + inner] for start in range(2 * self.radius + 1)], dim=2)
            return near.reshape(batch, shared * inner, -1, dim)

        out = self.attend(asked.reshape(batch, -1, length, dim), windows(k), windows(v))
        out = out.reshape(batch * shared, inner, self.group, length * dim).transpose(1, 2)
        return out.reshape(batch, shared * self.group, inner * length, dim)

    def forward(self, x: Tensor, context: Tensor, tables: Tables | None = None) -> Tensor:
        q, k, v = self.project(x, context, tables)
        everywhere = self.attend(q, self._compress(self.compress_k, k), self._compress(self.compress_v, v))
        nearby = self._neighbourhood(q, k, v)
        gate = torch.sigmoid(self.gate(x)).transpose(1, 2)[..., None]
        out = nearby + gate * (everywhere - nearby)
        return self.to_out(out.transpose(1, 2).flatten(2))


class SnapGenPlusBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last scaled, shifted and gated by time.

    One table a block is added to the time's six vectors (adaLN-single of PixArt, arXiv 2310.00426).
    """

    def __init__(self, config: SnapGenPlusConfig, ff_ratio: int, sparse: bool) -> None:
        super().__init__()
        dim = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn1: GroupedAttention = (
            SparseAttention(config) if sparse else GroupedAttention(dim, dim, config.head_dim, config.kv_group)
        )
        self.attn2 = GroupedAttention(dim, config.cross_attention_dim, config.head_dim, 1)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.fc1 = nn.Linear(dim, dim * ff_ratio)
        self.fc2 = nn.Linear(dim * ff_ratio, dim)

    def forward(self, x: Tensor, context: Tensor, time: Tensor, tables: Tables) -> Tensor:
        moved = self.scale_shift_table[None] + time
        shift1, scale1, gate1, shift2, scale2, gate2 = (moved[:, i : i + 1] for i in range(6))
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn1(h, h, tables)
        x = x + self.attn2(x, context)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class SnapGenPlusDiT(nn.Module):
    """Denoiser: (latent [B, C, H, W], timestep [B], context [B, L, D]) -> velocity [B, C, H, W], arXiv 2601.08303."""

    fine_cosines: Tensor
    fine_sines: Tensor
    coarse_cosines: Tensor
    coarse_sines: Tensor

    def __init__(self, config: SnapGenPlusConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, config.patch_size
        side = config.sample_size // patch
        self.patch_embed = nn.Conv2d(config.in_channels, dim, patch, stride=patch)
        self.time_embedding = TimeEmbedding(TIME_CHANNELS, dim)
        self.time_projection = nn.Linear(dim, 6 * dim)
        down, middle, up = config.depths
        self.down_blocks = nn.ModuleList(
            [SnapGenPlusBlock(config, config.ff_ratios[0], sparse=True) for _ in range(down)]
        )
        self.downsample = nn.Conv2d(dim, dim, 2, stride=2)
        self.middle_blocks = nn.ModuleList(
            [SnapGenPlusBlock(config, config.ff_ratios[1], sparse=False) for _ in range(middle)]
        )
        # As in U-ViT (arXiv 2209.12152): the last block of the middle reads the first one's input, and so on inwards.
        self.middle_skips = nn.ModuleList([nn.Linear(2 * dim, dim) for _ in range(middle // 2)])
        self.upsample = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.up_skip = nn.Linear(2 * dim, dim)
        self.up_blocks = nn.ModuleList([SnapGenPlusBlock(config, config.ff_ratios[2], sparse=True) for _ in range(up)])
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.ConvTranspose2d(dim, config.in_channels, patch, stride=patch)
        for name, length in (("fine", side), ("coarse", side // 2)):
            cosines, sines = rotary_tables(length, length, config.head_dim)
            self.register_buffer(f"{name}_cosines", cosines, persistent=False)
            self.register_buffer(f"{name}_sines", sines, persistent=False)

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        dim = self.scale_shift_table.shape[1]
        embedded = self.time_embedding(timestep_features(timestep, TIME_CHANNELS).to(latent.dtype))
        time = self.time_projection(F.silu(embedded)).reshape(-1, 6, dim)
        picture = self.patch_embed(latent)
        batch, _, height, width = picture.shape
        fine, coarse = (self.fine_cosines, self.fine_sines), (self.coarse_cosines, self.coarse_sines)
        x = picture.flatten(2).transpose(1, 2)
        for block in self.down_blocks:
            x = block(x, context, time, fine)
        down = x
        x = self.downsample(x.transpose(1, 2).reshape(batch, dim, height, width)).flatten(2).transpose(1, 2)
        kept: list[Tensor] = []
        first = len(self.middle_blocks) - len(self.middle_skips)
        for index, block in enumerate(self.middle_blocks):
            if index < len(self.middle_skips):
                kept.append(x)
            elif index >= first:
                x = self.middle_skips[index - first](torch.cat([x, kept.pop()], dim=-1))
            x = block(x, context, time, coarse)
        x = self.upsample(x.transpose(1, 2).reshape(batch, dim, height // 2, width // 2)).flatten(2).transpose(1, 2)
        x = self.up_skip(torch.cat([x, down], dim=-1))
        for block in self.up_blocks:
            x = block(x, context, time, fine)
        moved = self.scale_shift_table[None] + embedded[:, None]
        x = self.norm_out(x) * (1 + moved[:, 1:]) + moved[:, :1]
        return self.proj_out(x.transpose(1, 2).reshape(batch, dim, height, width))
