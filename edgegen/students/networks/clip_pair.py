"""Two CLIP text encoders as one, as SDXL (arXiv 2307.01952) and Stable Diffusion 3 (arXiv 2403.03206) read a prompt.

Both give the output of their last layer but one, without the final norm, side by side; a projection of what the end
token became is the pooled vector. Parameter names below `text_encoder` and `text_encoder_2` are those of transformers'
`CLIPTextModel` and `CLIPTextModelWithProjection`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from edgegen.students.networks.clip_text import ClipTextConfig, ClipTextEncoder


class ClipHalfConfig(BaseModel):
    """One of the two encoders; `text` has all its layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: ClipTextConfig
    projection_dim: int | None = None
    """Width of the pooled vector; None: it has none, and neither its last layer nor its final norm is built."""
    eos_token_id: int = 49407
    pad_token_id: int | None = None
    """What its own tokenizer fills up with after the first end token; None: the ids come filled up so already."""


class ClipPairConfig(BaseModel):
    """`text_encoder` and `text_encoder_2` of a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: ClipHalfConfig
    second: ClipHalfConfig
    width: int | None = None
    """Stable Diffusion 3: features are filled up with zeros to this width."""
    absent_tokens: int = 0
    """Stable Diffusion 3 without its third encoder: that many positions of zeros follow."""


class ClipHalf(ClipTextEncoder):
    """input_ids [B, L] -> hidden [B, L, D] and pooled [B, P] or None."""

    def __init__(self, config: ClipHalfConfig) -> None:
        text = config.text
        if config.projection_dim is None:
            text = text.model_copy(update={"num_hidden_layers": text.num_hidden_layers - 1})
        super().__init__(text)
        self.reads = config
        self.text_projection: nn.Linear | None = None
        if config.projection_dim is None:
            self.text_model.add_module("final_layer_norm", nn.Identity())
        else:
            self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        length = text.max_position_embeddings
        self.earlier: Tensor
        self.register_buffer("earlier", torch.triu(torch.ones(length, length), diagonal=1), persistent=False)

    def read(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        length = input_ids.shape[1]
        # Sums over positions in place of cumsum, argmax and gather: one product that every runtime has.
        ends = (input_ids == self.reads.eos_token_id).to(torch.float32)
        before = ends @ self.earlier[:length, :length]
        ids = input_ids
        if self.reads.pad_token_id is not None:
            ids = torch.where(before > 0.5, torch.full_like(input_ids, self.reads.pad_token_id), input_ids)
        mask = self.causal_mask[:length, :length]
        x = self.text_model.embeddings(ids)
        if self.text_projection is None:
            return self.text_model.encoder(x, mask), None
        *layers, last = self.text_model.encoder.layers
        for layer in layers:
            x = layer(x, mask)
        first = ends * (before < 0.5).to(torch.float32)
        end = first[:, None, :] @ self.text_model.final_layer_norm(last(x, mask))
        return x, self.text_projection(end[:, 0])


class ClipPair(nn.Module):
    """Text encoder: input_ids int32 [1, L] of the first tokenizer -> context [1, L', D], pooled [1, P].

    The second tokenizer has the same vocabulary and differs in what it fills up with.
    """

    def __init__(self, config: ClipPairConfig) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = ClipHalf(config.first)
        self.text_encoder_2 = ClipHalf(config.second)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        (one, pooled_one), (two, pooled_two) = self.text_encoder.read(input_ids), self.text_encoder_2.read(input_ids)
        context = torch.cat([one, two], dim=-1)
        if self.config.width is not None:
            context = F.pad(context, (0, self.config.width - context.shape[-1], 0, self.config.absent_tokens))
        pooled = [part for part in (pooled_one, pooled_two) if part is not None]
        return context, torch.cat(pooled, dim=-1)
