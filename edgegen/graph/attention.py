"""The arguments of one `aten.scaled_dot_product_attention`, and masks as numbers that half precision survives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
MASKED = -6.0e4
"""What a masked score has added: its exponential is 0 in fp32, and fp16 holds it, unlike -inf and finfo.min."""
_ORDER = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@dataclass(frozen=True)
class AttentionCall:
    """query [..., H, L, E], key [..., K, S, E], value [..., K, S, V]; K is H unless `grouped`."""

    query: Node
    key: Node
    value: Node
    mask: Node | None
    dropout: float
    causal: bool
    scale: float
    grouped: bool

    @property
    def lead(self) -> tuple[int, ...]:
        """Batch axes and heads of the keys; with grouped queries each of them serves `share` heads of the queries."""
        return tuple(self.key.meta["val"].shape[:-2])

    @property
    def share(self) -> int:
        return int(math.prod(self.query.meta["val"].shape[:-2]) // max(math.prod(self.lead), 1))


def read_attention(node: Node) -> AttentionCall:
    """What a call of attention says, defaults filled in."""
    given: dict[str, Any] = {**_DEFAULTS, **node.kwargs, **dict(zip(_ORDER, node.args, strict=False))}
    scale = given["scale"]
    if scale is None:
        scale = int(given["query"].meta["val"].shape[-1]) ** -0.5
    return AttentionCall(
        query=given["query"],
        key=given["key"],
        value=given["value"],
        mask=given["attn_mask"],
        dropout=float(given["dropout_p"]),
        causal=bool(given["is_causal"]),
        scale=float(scale),
        grouped=bool(given["enable_gqa"]),
    )


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True: keep) or an additive one as a finite additive mask of `dtype`."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, MASKED)
    return mask.to(dtype).clamp_min(MASKED)


def hides_a_row(mask: Tensor) -> bool:
    """Whether a mask held by the graph hides every key from some query."""
    return bool((additive_mask(mask, torch.float32) <= MASKED).all(-1).any())
