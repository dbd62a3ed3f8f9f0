"""Attention as one operation (iOS 18)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlprogram.kernel import Accumulate, arithmetic
from mlprogram.ops.activation import softmax
from mlprogram.sums import product


@arithmetic("scaled_dot_product_attention", alike=("query", "key", "value"))
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, accumulate: Accumulate = "fp32"
) -> Tensor:
    scores = product(query, key.mT, accumulate) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -math.inf)
        scores = scores + attn_mask
    return product(softmax(scores, -1, accumulate), value, accumulate)
