"""Video denoiser of MobileI2V (arXiv 2511.21475): a transformer of linear attention with a few softmax blocks.

Parameter names and arithmetic are those of the public code (github.com/hustvl/MobileI2V, `Mobiledit_300M_P1_D16` in
`diffusion/model/nets/mobiledit.py`, with `sana_blocks.py`, `basic_modules.py` and `rope.py` beside it), read and not
copied. What is written otherwise gives the same numbers:

- Modulation has one row a frame, not one a token: tokens of a frame share their time.
- The caption is embedded there and never read, so it has no place here; classifier-free guidance, which mixes two equal
  predictions, goes with it.
- The reference overwrites the first latent frame with the image's latent before every step and after the last. Here the
  denoiser does both: it reads the image's latent in place of the frame that it is given, and answers with the velocity
  that brings that frame to the image's latent, (x - image) / sigma. Euler's steps from sigma 1 to 0 then end on it, and
  a sampler needs to know nothing of it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from edgegen.students.networks.unet import timestep_features

AttentionKind = Literal["linear", "softmax"]
PATTERN: tuple[AttentionKind, ...] = (*("linear",) * 7, "softmax") * 2


class MobileDiTConfig(BaseModel):
    """Shape of the network, for one size of latent: `frames` x `height` x `width` tokens (the patch is 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: int = 3
    height: int = 23
    width: int = 40
    in_channels: int = 128
    hidden_size: int = 1152
    head_dim: int = 72
    blocks: tuple[AttentionKind, ...] = PATTERN
    mlp_ratio: float = 2.5
    frequency_size: int = 256
    rope_scale: tuple[float, float, float] = (1.0, 1.4375, 2.5)
    """Positions are divided by these along frames, rows and columns: 23 x 40 is laid over 16 x 16."""
    num_train_timesteps: int = 1000

    @model_validator(mode="after")
    def _heads(self) -> MobileDiTConfig:
        if self.head_dim % 6 or self.hidden_size % self.head_dim:
            raise ValueError("`head_dim` must be a multiple of 6 (three axes, two halves) and divide `hidden_size`")
        return self


def rope_tables(config: MobileDiTConfig) -> tuple[Tensor, Tensor]:
    """cos and signed sin [N, head_dim] for `rotate`: a third of the channels an axis, base 10000, in fp32.

    Within an axis the channels are two halves that turn together (Su et al. 2021, arXiv 2104.09864); the sign of the
    first half's partner is in the sine.
    """
    dim = config.head_dim // 3
    inverse = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    grid = torch.meshgrid(*(torch.arange(n) for n in (config.frames, config.height, config.width)), indexing="ij")
    cosines, sines = [], []
    for positions, scale in zip(grid, config.rope_scale, strict=True):
        angles = (positions.flatten().float() / scale)[:, None] * inverse[None]
        cosines += [angles.cos(), angles.cos()]
        sines += [-angles.sin(), angles.sin()]
    return torch.cat(cosines, dim=-1), torch.cat(sines, dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [N, heads, D] turned by its token's position; `cos` and `sin` [N, D] of `rope_tables`."""
    tokens, heads, dim = x.shape
    halves = x.reshape(tokens, heads * 3, 2, dim // 6)
    swapped = torch.cat([halves[:, :, 1:], halves[:, :, :1]], dim=2).reshape(x.shape)
    return x * cos[:, None] + swapped * sin[:, None]


class Embedder(nn.Module):
    """A number -> a vector: sinusoids, then an MLP (`TimestepEmbedder`)."""

    def __init__(self, frequency_size: int, hidden_size: int) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, value: Tensor) -> Tensor:
        return self.mlp(timestep_features(value, self.frequency_size).to(value.dtype))


class LinearAttention(nn.Module):
    """sum_s v_s (k_s . q) / (sum_s k_s . q + eps) with q and k behind a ReLU (`LiteLA`; arXiv 2006.16236, 2410.10629).

    The denominator is one more row of the values, of ones. Sums over all tokens and the division are fp32 in the
    reference; a float16 artifact has them scaled into range by the half-safety passes instead, and what leaves the
    attention is clipped to float16's range where it is computed in it, as there.
    """

    epsilon = 1e-8

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = nn.RMSNorm(dim, eps=1e-5)
        self.k_norm = nn.RMSNorm(dim, eps=1e-5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens = x.shape[1]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        dim = v.shape[2]
        shape = (tokens, dim // self.head_dim, self.head_dim)
        q = F.relu(rotate(self.q_norm(q).reshape(shape), cos, sin)).permute(1, 2, 0)
        k = F.relu(rotate(self.k_norm(k).reshape(shape), cos, sin)).permute(1, 0, 2)
        v = v.reshape(shape).permute(1, 2, 0)
        half = x.dtype == torch.float16
        if half:
            q, k, v = q.float(), k.float(), v.float()
        sums = torch.matmul(torch.matmul(F.pad(v, (0, 0, 0, 1), value=1.0), k), q)
        out = sums[:, :-1] / (sums[:, -1:] + self.epsilon)
        out = self.proj(out.to(x.dtype).reshape(1, dim, tokens).transpose(1, 2))
        return out.clip(-65504.0, 65504.0) if half else out


class SoftmaxAttention(nn.Module):
    """Attention over all tokens with a bias in qkv, rotary positions and no norms (`Attention`)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens = x.shape[1]
        parts = self.qkv(x).chunk(3, dim=-1)
        dim = parts[0].shape[2]
        shape = (tokens, dim // self.head_dim, self.head_dim)
        q, k, v = (part.reshape(shape) for part in parts)
        turned = (rotate(q, cos, sin), rotate(k, cos, sin), v)
        q, k, v = (part.reshape(1, *shape).transpose(1, 2) for part in turned)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(1, tokens, dim))


class ConvLayer(nn.Module):
    """Holds the name that the reference's convolutions have."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck over each frame (SANA, arXiv 2410.10629): 1x1, SiLU, depthwise 3x3, SiLU gate, 1x1."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.inverted_conv = ConvLayer(nn.Conv2d(dim, 2 * hidden, 1))
        self.depth_conv = ConvLayer(nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden))
        self.point_conv = ConvLayer(nn.Conv2d(hidden, dim, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        both = self.depth_conv(F.silu(self.inverted_conv(x)))
        half = both.shape[1] // 2
        return self.point_conv(both[:, :half] * F.silu(both[:, half:]))


class Block(nn.Module):
    """adaLN-single (PixArt, arXiv 2310.00426): x + gate * attention(norm * scale + shift), then the same with the
    GLUMBConv. Tokens are [T, S, C]; `modulation` is [T, 6, C]."""

    def __init__(self, config: MobileDiTConfig, kind: AttentionKind) -> None:
        super().__init__()
        dim = config.hidden_size
        self.size = (config.height, config.width)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        attention = LinearAttention if kind == "linear" else SoftmaxAttention
        self.attn = attention(dim, config.head_dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = GLUMBConv(dim, int(dim * config.mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        frames, places, dim = x.shape
        rows = self.scale_shift_table[None] + modulation
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (rows[:, i : i + 1] for i in range(6))
        h = self.norm1(x) * (1 + scale) + shift
        h = self.attn(h.reshape(1, frames * places, dim), cos, sin)
        x = x + gate * h.reshape(frames, places, dim)
        h = self.norm2(x) * (1 + mlp_scale) + mlp_shift
        h = self.mlp(h.transpose(1, 2).reshape(frames, dim, *self.size))
        return x + mlp_gate * h.reshape(frames, dim, places).transpose(1, 2)


class PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """Norm, modulation by the embedded time itself (not by its six vectors), projection (`T2IFinalLayer`)."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        rows = self.scale_shift_table[None] + time[:, None]
        return self.linear(self.norm_final(x) * (1 + rows[:, 1:]) + rows[:, :1])


def _start(linear: nn.Module, gain: float) -> None:
    """Weights of an untrained network in which time and flow score are seen: torch's own leave gates near zero."""
    assert isinstance(linear, nn.Linear)
    nn.init.normal_(linear.weight, std=gain * (2 / linear.in_features) ** 0.5)


class MobileDiT(nn.Module):
    """Denoiser: (latent [1, C, T, H, W], timestep [1] in 0..1000, image_latent [1, C, 1, H, W], flow_score [1]) ->
    velocity [1, C, T, H, W].

    The timestep must not be 0. `flow_score` says how much should move; the reference's own runs use 1 to 10.
    """

    def __init__(self, config: MobileDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels, dim)
        self.t_embedder = Embedder(config.frequency_size, dim)
        self.flow_embedder = Embedder(config.frequency_size, dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.flow_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([Block(config, kind) for kind in config.blocks])
        self.final_layer = FinalLayer(dim, config.in_channels)
        cos, sin = rope_tables(config)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name in ("t_embedder.mlp.0", "flow_embedder.mlp.0", "t_block.1", "flow_block.1"):
            _start(self.get_submodule(name), 1.0)
        for name in ("t_embedder.mlp.2", "flow_embedder.mlp.2"):
            _start(self.get_submodule(name), 2.0)

    def forward(self, latent: Tensor, timestep: Tensor, image_latent: Tensor, flow_score: Tensor) -> Tensor:
        _, channels, frames, height, width = latent.shape
        sigma = timestep / self.config.num_train_timesteps
        noisy = latent.reshape(channels, frames, height, width).transpose(0, 1)
        image = image_latent.reshape(1, channels, height, width)
        x = self.x_embedder(torch.cat([image, noisy[1:]]))

        # The image is no noise: its tokens are at time 0 in every step.
        time = self.t_embedder(torch.cat([torch.zeros_like(sigma), sigma.expand(frames - 1)]))
        modulation = self.t_block(time) + self.flow_block(self.flow_embedder(flow_score))
        modulation = modulation.reshape(frames, 6, -1)
        for block in self.blocks:
            x = block(x, modulation, self.cos, self.sin)
        x = self.final_layer(x, time).transpose(1, 2).reshape(frames, channels, height, width)
        x = torch.cat([(noisy[:1] - image) / sigma.to(latent.dtype), x[1:]])
        return x.transpose(0, 1).reshape(latent.shape)
