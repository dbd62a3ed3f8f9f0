"""What XNNPACK under ExecuTorch takes whole: every op of an SDXS-like UNet ends in one delegate.

Upsampling is a convolution of phases, not `upsample-to-conv-transpose`: both keep the delegate in one piece, but at
SDXS-512's size the transposed convolution is slower than leaving the upsampling outside.
"""

from __future__ import annotations

from edgegen.rewrite.activation_form import ActivationForm
from edgegen.rewrite.base import Pass
from edgegen.rewrite.channel_mean_to_conv import ChannelMeanToConv
from edgegen.rewrite.explicit_attention import ExplicitAttention
from edgegen.rewrite.explicit_group_norm import ExplicitGroupNorm
from edgegen.rewrite.explicit_layer_norm import ExplicitLayerNorm
from edgegen.rewrite.explicit_rms_norm import ExplicitRmsNorm
from edgegen.rewrite.fold_bias_add import FoldBiasAdd
from edgegen.rewrite.fold_norm_affine import FoldNormAffine
from edgegen.rewrite.grouped_query import GroupedQuery
from edgegen.rewrite.merge_repeated_cat import MergeRepeatedCat
from edgegen.rewrite.mobile_linear_attention import MobileLinearAttention
from edgegen.rewrite.split_chunked_linear import SplitChunkedLinear
from edgegen.rewrite.upsample_to_pixel_shuffle import UpsampleToPixelShuffle


def passes() -> tuple[Pass, ...]:
    """In order, after the canonical passes."""
    return (
        MergeRepeatedCat(),
        SplitChunkedLinear(),
        MobileLinearAttention(total="product"),
        FoldNormAffine(),
        GroupedQuery(form="fold"),
        ExplicitAttention(rank=3),
        FoldBiasAdd(),
        ExplicitGroupNorm(form="grouped-conv"),
        ExplicitLayerNorm(form="linear-mean"),
        ExplicitRmsNorm(form="linear-mean"),
        ChannelMeanToConv(),
        UpsampleToPixelShuffle(form="permute"),
        # The delegate has one GELU, by erf, and computes the one by tanh with it: 88 dB where others reach 130.
        ActivationForm(silu="keep", gelu="split-tanh"),
    )
