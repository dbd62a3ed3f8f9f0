"""What XNNPACK under TFLite runs fastest: one delegate, no BROADCAST_TO, few RESHAPE and TRANSPOSE.

Measured on an SDXS-like UNet, operator by operator: two thirds of the time is convolutions, one sixth linears. The
upsampling convolutions are the one place where whole MACs can be saved; the other passes save operators, each of which
costs a turn of the thread pool. Attention is on rank-3 matrices because the converter brings BATCH_MATMUL there anyway
and pays for each rank-4 one with two RESHAPE of the scores.
"""

from __future__ import annotations

from edgegen.rewrite.base import Pass
from edgegen.rewrite.explicit_attention import ExplicitAttention
from edgegen.rewrite.explicit_group_norm import ExplicitGroupNorm
from edgegen.rewrite.explicit_layer_norm import ExplicitLayerNorm
from edgegen.rewrite.explicit_rms_norm import ExplicitRmsNorm
from edgegen.rewrite.fold_bias_add import FoldBiasAdd
from edgegen.rewrite.fold_norm_affine import FoldNormAffine
from edgegen.rewrite.grouped_query import GroupedQuery
from edgegen.rewrite.mobile_linear_attention import MobileLinearAttention
from edgegen.rewrite.sink_transposes import SinkTransposes
from edgegen.rewrite.split_chunked_linear import SplitChunkedLinear
from edgegen.rewrite.upsample_to_pixel_shuffle import UpsampleToPixelShuffle


def passes() -> tuple[Pass, ...]:
    """In order, after the canonical passes."""
    return (
        SplitChunkedLinear(),
        MobileLinearAttention(),
        FoldNormAffine(),
        GroupedQuery(form="fold", least=2),
        ExplicitAttention(rank=3),
        FoldBiasAdd(),
        ExplicitGroupNorm(form="grouped-conv"),
        ExplicitLayerNorm(form="linear-mean"),
        ExplicitRmsNorm(form="linear-mean"),
        SinkTransposes(images=True),
        UpsampleToPixelShuffle(form="permute"),
    )
