"""What Core ML's Neural Engine compiler takes without moving data around: channels first, four axes, few transposes.

Attention is one product for all heads: on an SDXS-like UNet of 12.9 M that makes 401 operations with one transpose
where the canonical graph makes 621 with 60. Form `split`, one product a head as Apple's ane_transformers has it, makes
665 with 7; which of the two is faster on a Neural Engine has not been measured.
"""

from __future__ import annotations

from edgegen.rewrite.base import Pass
from edgegen.rewrite.channels_first_attention import ChannelsFirstAttention
from edgegen.rewrite.channels_first_tokens import ChannelsFirstTokens
from edgegen.rewrite.group_norm_as_instance_norm import GroupNormAsInstanceNorm
from edgegen.rewrite.grouped_query import GroupedQuery
from edgegen.rewrite.mobile_linear_attention import MobileLinearAttention
from edgegen.rewrite.split_chunked_linear import SplitChunkedLinear


def passes() -> tuple[Pass, ...]:
    """In order, after the canonical passes."""
    return (
        SplitChunkedLinear(),
        MobileLinearAttention(),
        GroupedQuery(form="fold"),
        ChannelsFirstAttention(form="whole"),
        ChannelsFirstTokens(),
        GroupNormAsInstanceNorm(),
    )
