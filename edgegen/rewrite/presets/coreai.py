"""What Core AI wants: its own composites (attention, norms, SiLU) as they are, 1x1 convolutions between them.

The converter keeps attention, GroupNorm, LayerNorm and InstanceNorm as declared composites that the device's compiler
knows by name; written out they are anonymous arithmetic. Linears it writes as batched products of broadcast weights.
"""

from __future__ import annotations

from edgegen.rewrite.base import Pass
from edgegen.rewrite.grouped_query import GroupedQuery
from edgegen.rewrite.linear_to_conv1x1 import LinearToConv1x1
from edgegen.rewrite.mobile_linear_attention import MobileLinearAttention
from edgegen.rewrite.sink_transposes import SinkTransposes


def passes() -> tuple[Pass, ...]:
    """In order, after the canonical passes."""
    return (
        MobileLinearAttention(),
        GroupedQuery(form="flag"),
        LinearToConv1x1(where="everywhere"),
        SinkTransposes(),
    )
