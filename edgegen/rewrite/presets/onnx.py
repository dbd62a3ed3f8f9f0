"""What onnxruntime's CPU provider runs fastest: it fuses norms itself, so they stay whole."""

from __future__ import annotations

from edgegen.rewrite.base import Pass
from edgegen.rewrite.conv1x1_to_linear import Conv1x1ToLinear
from edgegen.rewrite.explicit_attention import ExplicitAttention
from edgegen.rewrite.fold_bias_add import FoldBiasAdd
from edgegen.rewrite.grouped_query import GroupedQuery
from edgegen.rewrite.split_chunked_linear import SplitChunkedLinear
from edgegen.rewrite.upsample_to_pixel_shuffle import UpsampleToPixelShuffle


def passes() -> tuple[Pass, ...]:
    """In order, after the canonical passes."""
    return (
        SplitChunkedLinear(),
        GroupedQuery(form="fold"),
        ExplicitAttention(rank=3),
        FoldBiasAdd(),
        UpsampleToPixelShuffle(form="permute"),
        Conv1x1ToLinear(where="tokens"),
    )
