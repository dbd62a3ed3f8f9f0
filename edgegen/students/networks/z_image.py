"""Z-Image's transformer (Z-Image Team 2025, arXiv 2511.22699) as a denoiser of one compiled size.

Its layers are diffusers' own, `ZImageTransformer2DModel`; what runs between them is written out here, since diffusers'
forward takes lists of any length and turns pairs of features by complex numbers. Same names, same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from edgegen.errors import EdgegenError
from edgegen.students.networks.upstream import Adopting, constructor_arguments, upstream_class

CLASS = "ZImageTransformer2DModel"
BLOCK = 32
"""Text and picture are filled up to a multiple of this with learned tokens."""
PATCH = 2
MASKED = -6.0e4


class ZImageConfig(BaseModel):
    """`transformer` is diffusers' `config.json`; latent side and number of text positions are those of the student."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transformer: dict[str, Any]
    sample_size: int
    text_length: int


class RealRotary:
    """Attention of one Z-Image block; `freqs_cis` is cosine and sine [1, L, head_dim / 2] in place of complex numbers.

    A pair of neighbouring features is turned together (Su et al. 2021, arXiv 2104.09864).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert freqs_cis is not None
        cos, sin = (part[:, :, None, :] for part in freqs_cis)

        def heads(projection: Any, norm: Any = None) -> Tensor:
            x = projection(hidden_states)
            x = x.reshape(*x.shape[:-1], attn.heads, x.shape[-1] // attn.heads)
            return x if norm is None else norm(x)

        def turned(x: Tensor) -> Tensor:
            # Firsts of all pairs, then seconds: queries and keys are reordered alike, which no product of them sees.
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)

        query, key = turned(heads(attn.to_q, attn.norm_q)), turned(heads(attn.to_k, attn.norm_k))
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), heads(attn.to_v).transpose(1, 2), attn_mask=attention_mask
        )
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class ZImage(Adopting):
    """Denoiser: latent [1, C, H, W], timestep [1] in 0..1000, context [1, L, D], mask [1, L] -> prediction like latent.

    The prediction is noise minus picture, as flow matching has it: the network's own time runs the other way, and its
    sign is turned. Text past the next multiple of 32 is hidden from attention, and the picture's place on the first
    rotary axis is after it, so a short prompt costs the same and gives what it gives upstream.
    """

    _starts: Tensor
    _text: Tensor
    _place: Tensor
    _real: Tensor
    _edges: Tensor

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.config = config
        if config.text_length % BLOCK or config.sample_size % PATCH:
            raise EdgegenError(
                f"Z-Image needs a text length that is a multiple of {BLOCK} and an even latent side, "
                f"not {config.text_length} and {config.sample_size}"
            )
        made = upstream_class("diffusers", CLASS)
        network = made(**constructor_arguments(made, config.transformer, CLASS))
        self.adopt(network)
        for layer in (*network.noise_refiner, *network.context_refiner, *network.layers):
            layer.attention.set_processor(RealRotary())
        side = config.sample_size // PATCH
        self.tokens = side * side
        self.filled = -self.tokens % BLOCK
        widths = [width // 2 for width in network.config.axes_dims]
        rates = [network.config.rope_theta ** (-torch.arange(n, dtype=torch.float64) / n) for n in widths]

        def angles(axis: int, positions: Tensor) -> Tensor:
            return torch.outer(positions.double(), rates[axis])

        blocks = config.text_length // BLOCK
        at = torch.arange(side)
        rest = sum(widths[1:])
        starts = angles(0, BLOCK * torch.arange(1, blocks + 1) + 1)
        text = F.pad(angles(0, 1 + torch.arange(config.text_length)), (0, rest))
        place = torch.cat(
            [angles(1, at)[:, None].expand(side, side, -1), angles(2, at)[None].expand(side, side, -1)], dim=-1
        )
        # Learned filling stands at the origin of all axes, where nothing is turned.
        place = F.pad(place.flatten(0, 1), (0, 0, 0, self.filled))
        real = F.pad(torch.ones(self.tokens, 1), (0, 0, 0, self.filled))
        for name, value in {
            "starts": torch.stack([starts.cos(), starts.sin()]),
            "text": torch.stack([text.cos(), text.sin()]),
            "place": torch.stack([place.cos(), place.sin()]),
            "real": real,
            "edges": BLOCK * torch.arange(blocks),
        }.items():
            self.register_buffer(f"_{name}", value.float(), persistent=False)

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        network = self.network
        channels, side = latent.shape[1], self.config.sample_size // PATCH
        key = f"{PATCH}-1"
        time = network.t_embedder((1000.0 - timestep) / 1000.0 * network.t_scale)

        # Which blocks of text hold any of it, and which is the last one that does.
        used = (mask.sum(dim=1, keepdim=True) > self._edges).to(latent.dtype)
        last = used - F.pad(used[:, 1:], (0, 1))
        seen = used[:, :, None].expand(-1, -1, BLOCK).flatten(1)
        text_bias = ((1.0 - seen) * MASKED)[:, None, None, :]
        image_bias = torch.zeros_like(self._real)[None, None, None, :, 0]
        text_turn = (self._text[0][None], self._text[1][None])
        # cos 1 and sin 0 where there is filling.
        cos = (last @ self._starts[0])[:, None] * self._real + (1.0 - self._real)
        sin = (last @ self._starts[1])[:, None] * self._real
        image_turn = (torch.cat([cos, self._place[0][None]], -1), torch.cat([sin, self._place[1][None]], -1))

        x = latent.reshape(channels, side, PATCH, side, PATCH).permute(1, 3, 2, 4, 0)
        x = network.all_x_embedder[key](x.reshape(1, self.tokens, PATCH * PATCH * channels))
        x = torch.cat([x, network.x_pad_token[None].expand(1, self.filled, -1)], dim=1) if self.filled else x
        for layer in network.noise_refiner:
            x = layer(x, image_bias, image_turn, time)

        text = torch.where(mask[:, :, None] > 0.5, network.cap_embedder(context), network.cap_pad_token[None])
        for layer in network.context_refiner:
            text = layer(text, text_bias, text_turn)

        x = torch.cat([x, text], dim=1)
        bias = torch.cat([image_bias.expand(1, 1, 1, -1), text_bias], dim=-1)
        turn = tuple(torch.cat([a, b], dim=1) for a, b in zip(image_turn, text_turn, strict=True))
        for layer in network.layers:
            x = layer(x, bias, turn, time)
        x = network.all_final_layer[key](x, c=time)[:, : self.tokens]
        x = x.reshape(side, side, PATCH, PATCH, channels).permute(4, 0, 2, 1, 3)
        return -x.reshape(1, channels, PATCH * side, PATCH * side)
