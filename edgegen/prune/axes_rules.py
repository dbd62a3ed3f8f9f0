"""Which rule an op follows."""

from __future__ import annotations

from collections.abc import Mapping

from edgegen.prune.axes import MOVES, Rule
from edgegen.prune.axes_moves import (
    cat,
    elementwise,
    expand,
    in_the_plane,
    move,
    pad,
    part,
    pixel_shuffle,
    pixel_unshuffle,
    reduction,
    softmax,
)
from edgegen.prune.axes_products import (
    attention,
    batch_norm,
    conv,
    conv_transposed,
    convolution,
    embedding,
    group_norm,
    layer_norm,
    linear,
    matmul,
)

_ELEMENTWISE = """
add add_ sub rsub mul mul_ div neg abs pow square sqrt rsqrt reciprocal exp log log1p expm1 sin cos tanh sigmoid logit
erf relu relu_ relu6 silu silu_ gelu elu leaky_relu hardtanh hardswish hardsigmoid softplus mish selu celu prelu clamp
clamp_min clamp_max clip maximum minimum where masked_fill eq ne lt le gt ge logical_and logical_or logical_not
bitwise_not bitwise_and bitwise_or isnan isinf sign floor ceil round trunc fmod remainder atan2 lerp addcmul addcdiv to
_to_copy type_as float half dropout dropout_ feature_dropout lift_fresh_copy zeros_like ones_like full_like empty_like
rand_like randn_like copy fill nan_to_num threshold hardshrink softsign
"""
_IN_THE_PLANE = """
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d
upsample_trilinear3d _upsample_nearest_exact2d avg_pool1d avg_pool2d avg_pool3d max_pool2d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d reflection_pad2d replication_pad2d replication_pad3d
"""
_REDUCTIONS = "mean sum amax amin prod var std var_mean logsumexp norm linalg_vector_norm any all max min"
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(MOVES, move),
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(_IN_THE_PLANE.split(), in_the_plane),
    **dict.fromkeys(_REDUCTIONS.split(), reduction),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), conv_transposed),
    **dict.fromkeys(("matmul", "bmm", "mm", "addmm", "baddbmm"), matmul),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_safe_softmax"), softmax),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(("cat", "concat", "stack"), cat),
    **dict.fromkeys(("constant_pad_nd", "pad"), pad),
    **dict.fromkeys(("slice", "narrow"), part(1)),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), part(2)),
    "select": part(1, picks=True),
    "unbind": part(1, picks=True),
    "expand": expand,
    "convolution": convolution,
    "linear": linear,
    "scaled_dot_product_attention": attention,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "instance_norm": batch_norm,
    "embedding": embedding,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
}
