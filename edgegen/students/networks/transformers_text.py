"""Language models of transformers as text encoders: T5 (PixArt), Gemma 2 (SANA), Qwen 3 (Z-Image).

CLIP is `clip_text` or `clip_pair`, ours. Attention masks are made here, from the ids, so that nothing of transformers'
mask machinery is traced.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from edgegen.students.networks.upstream import upstream_class

MASKED = -6.0e4
"""Finite, and inside fp16's range: -inf or finfo.min turn a half-precision softmax into NaN on several runtimes."""

GROUPED = "edgegen_grouped"
"""The name under which transformers knows `grouped_attention`."""

READ: dict[str, tuple[str, ...]] = {
    "T5EncoderModel": (
        *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets"),
        *("relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj"),
    ),
    "Gemma2Model": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "hidden_activation", "rms_norm_eps", "rope_theta", "attention_bias"),
        *("query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping", "max_position_embeddings"),
        *("rope_parameters", "layer_types"),
    ),
    "Qwen3Model": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "attention_bias"),
        *("max_position_embeddings", "rope_parameters"),
    ),
}
"""The settings of each class that decide its arithmetic: all that is read of a `config.json`."""

CONFIGS = {"T5EncoderModel": "T5Config", "Gemma2Model": "Gemma2Config", "Qwen3Model": "Qwen3Config"}


class TransformersTextConfig(BaseModel):
    """`encoder` is the `config.json` of a model of class `class_name`, of which the settings in `READ` count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    class_name: Literal["T5EncoderModel", "Gemma2Model", "Qwen3Model"]
    encoder: dict[str, Any]
    pad_token_id: int
    layer: Literal["last", "penultimate"] = "last"
    """The last layer after the final norm, or the one before it as it is: then neither the last layer nor the final
    norm is built."""
    keep: int | None = None
    """How many positions go on: the first one and the last `keep` - 1 (a SANA prompt without its instruction)."""


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Attention of a decoder layer: heads that share keys are further queries of them, so that nothing is repeated.

    query [1, H, L, E], key and value [1, K, L, E], attention_mask [1, 1, L, L] additive -> [1, L, H, E]. Takes
    transformers' `scaling` and Gemma's `softcap`, which bounds the scores by its tanh.
    """
    heads, length, width = query.shape[1:]
    groups = heads // key.shape[1]
    folded = query.reshape(1, key.shape[1], groups * length, width)
    mask = torch.cat([attention_mask] * groups, dim=2)
    scale, cap = options.get("scaling") or width**-0.5, options.get("softcap")
    if cap is None:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    else:
        scores = cap * torch.tanh(folded @ key.transpose(2, 3) * (scale / cap))
        out = torch.softmax(scores + mask, dim=-1) @ value
    return out.reshape(1, heads, length, width).transpose(1, 2), None


class TransformersText(nn.Module):
    """Text encoder: input_ids int32 [1, L] -> context [1, K, D], mask [1, K] float, 1 for text and 0 for padding.

    Padding is on the right and is told by its id. T5: Raffel et al. 2020, arXiv 1910.10683; Gemma 2: arXiv 2408.00118;
    Qwen 3: arXiv 2505.09388.
    """

    def __init__(self, config: TransformersTextConfig) -> None:
        super().__init__()
        self.config = config
        read = {key: config.encoder[key] for key in READ[config.class_name] if key in config.encoder}
        depth = "num_layers" if config.class_name == "T5EncoderModel" else "num_hidden_layers"
        made = upstream_class("transformers", CONFIGS[config.class_name])
        layers = getattr(made(**{key: value for key, value in read.items() if key != "layer_types"}), depth)
        layers -= config.layer == "penultimate"
        kinds = {"layer_types": list(read["layer_types"])[:layers]} if "layer_types" in read else {}
        whole = made(**{**read, depth: layers, **kinds})
        grouped = config.class_name != "T5EncoderModel"  # T5 adds its position bias in the eager form
        if grouped:
            upstream_class("transformers", "AttentionInterface").register(GROUPED, grouped_attention)
        whole._attn_implementation = GROUPED if grouped else "eager"
        model = upstream_class("transformers", config.class_name)(whole)
        # The embedding is held twice by T5: once is enough.
        self.model: nn.Module = model.encoder if config.class_name == "T5EncoderModel" else model
        if config.layer == "penultimate":
            self.model.norm = nn.Identity()

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        length = input_ids.shape[1]
        there = (input_ids != self.config.pad_token_id).to(torch.float32)
        bias = ((1.0 - there) * MASKED)[:, None, None, :]
        given: Any = bias
        if self.config.class_name != "T5EncoderModel":
            future = torch.triu(torch.full((length, length), MASKED, device=input_ids.device), diagonal=1)
            bias = torch.minimum(bias, future)
            given = {"full_attention": bias, "sliding_attention": bias}
        made = self.model(input_ids=input_ids, attention_mask=given, use_cache=False)
        context = made.last_hidden_state
        keep = self.config.keep
        if keep is None or keep == length:
            return context, there
        return (
            torch.cat([context[:, :1], context[:, length - keep + 1 :]], dim=1),
            torch.cat([there[:, :1], there[:, length - keep + 1 :]], dim=1),
        )
