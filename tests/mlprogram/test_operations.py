"""Each operation against coremltools' own `value_inference`, and against torch where it has none.

All cases of one kind are built into one program, run once; a case is its name, its operation, the arrays that are
computed at run time and the parameters that are constants.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mlprogram import Program, ProgramError
from mlprogram.kernel import KERNELS

R = np.random.default_rng(0)


def f(*shape, low=-2.0, high=2.0):
    return R.uniform(low, high, shape).astype(np.float32)


def i(*shape, low=-9, high=9):
    return R.integers(low, high, shape).astype(np.int32)


X, Y = f(2, 3, 4), f(3, 1)
IX, IY = i(2, 3, 4), i(3, 1, low=1)
POSITIVE, UNIT = f(2, 3, low=0.1, high=3), f(2, 3, low=-0.9, high=0.9)
IMAGE = f(1, 4, 6, 5)
HALVES = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, -0.0], np.float32)
BINARY = ("add", "sub", "mul", "maximum", "minimum", "floor_div", "mod")
COMPARE = ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")
UNARY = {
    "abs ceil cos cosh erf exp exp2 floor sign sin sinh square tan tanh": X,
    "relu relu6 sigmoid softplus softsign gelu softmax": X,
    "sqrt log rsqrt inverse": POSITIVE,
    "acos asin atan atanh": UNIT,
    "round": HALVES,
}


def cases():
    """(name, operation, computed inputs, constants)"""
    for op in BINARY:
        yield op, op, {"x": X, "y": Y}, {}
        yield f"{op} of integers", op, {"x": IX, "y": IY}, {}
    for op in COMPARE:
        yield op, op, {"x": np.round(X), "y": np.round(Y)}, {}
        yield f"{op} of integers", op, {"x": IX, "y": IY}, {}
    yield "real_div", "real_div", {"x": X, "y": f(3, 1, low=0.5)}, {}
    yield "pow", "pow", {"x": POSITIVE, "y": f(2, 3)}, {}
    yield "pow of negative", "pow", {"x": X}, {"y": np.float32(3)}
    for names, x in UNARY.items():
        for op in names.split():
            yield op, op, {"x": x}, {}
    for op in ("abs", "sign", "square"):
        yield f"{op} of integers", op, {"x": IX}, {}
    yield "rsqrt with epsilon", "rsqrt", {"x": POSITIVE}, {"epsilon": np.float32(0.25)}
    yield "clip", "clip", {"x": X}, {"alpha": np.float32(-0.5), "beta": np.float32(1)}
    yield "threshold", "threshold", {"x": X}, {"alpha": np.float32(0.25)}
    for mode in ("TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"):
        yield f"gelu {mode}", "gelu", {"x": X}, {"mode": mode}
    for op in ("clamped_relu", "linear_activation", "scaled_tanh", "sigmoid_hard"):
        yield op, op, {"x": X}, {"alpha": np.float32(0.3), "beta": np.float32(0.7)}
    for op in ("elu", "leaky_relu"):
        yield op, op, {"x": X}, {"alpha": np.float32(0.3)}
    yield "prelu", "prelu", {"x": IMAGE}, {"alpha": f(4)}
    yield "softplus_parametric", "softplus_parametric", {"x": IMAGE}, {"alpha": f(4), "beta": f(4)}
    yield "softmax over 1", "softmax", {"x": X}, {"axis": 1}
    for op in ("sum", "mean", "max", "min", "prod", "l1_norm", "l2_norm", "sum_square", "log_sum_exp"):
        yield f"reduce_{op}", f"reduce_{op}", {"x": X}, {"axes": [-1, 0], "keep_dims": op == "mean"}
        yield f"reduce_{op} of all", f"reduce_{op}", {"x": X}, {"axes": [0, 1, 2], "keep_dims": True}
    yield "reduce_log_sum", "reduce_log_sum", {"x": POSITIVE}, {"axes": [1]}
    for op in ("sum", "mean", "max", "min", "prod"):
        yield f"reduce_{op} of integers", f"reduce_{op}", {"x": IX}, {"axes": [1]}
    for op in ("argmax", "argmin"):
        yield f"reduce_{op}", f"reduce_{op}", {"x": X}, {"axis": 1, "keep_dims": True}
    yield (
        "layer_norm",
        "layer_norm",
        {"x": X},
        {"axes": [1, 2], "gamma": f(3, 4), "beta": f(3, 4), "epsilon": np.float32(0.1)},
    )
    yield "l2_norm", "l2_norm", {"x": f(2, 2, 3, 4)}, {"epsilon": np.float32(1e-3)}
    yield "linear", "linear", {"x": X}, {"weight": f(5, 4), "bias": f(5)}
    yield "matmul", "matmul", {"x": f(2, 1, 3, 4), "y": f(5, 6, 4)}, {"transpose_y": True}
    yield "matmul turned", "matmul", {"x": f(4, 3), "y": f(4, 6)}, {"transpose_x": True}
    yield "matmul of integers", "matmul", {"x": i(3, 4), "y": i(4, 2)}, {}
    yield "expand_dims", "expand_dims", {"x": X}, {"axes": [0, -1]}
    yield "squeeze", "squeeze", {"x": f(1, 3, 1)}, {"axes": [0]}
    yield "reshape", "reshape", {"x": X}, {"shape": [0, -1, 2]}
    yield "transpose", "transpose", {"x": X}, {"perm": [-1, 0, 1]}
    yield "reverse", "reverse", {"x": X}, {"axes": [1]}
    yield "flatten2d", "flatten2d", {"x": X}, {"axis": 2}
    yield "shape", "shape", {"x": X}, {}
    yield "slice_by_size", "slice_by_size", {"x": X}, {"begin": [0, 1, 1], "size": [2, -1, 2]}
    yield "slice", "slice_by_index", {"x": X}, {"begin": [0, -2, 1], "end": [2, 3, 4], "stride": [1, 1, 2]}
    yield (
        "slice backwards",
        "slice_by_index",
        {"x": X},
        {
            "begin": [1, 0, 3],
            "end": [0, 0, 0],
            "stride": [1, 1, -2],
            "begin_mask": [False, True, False],
            "end_mask": [True, True, False],
        },
    )
    yield (
        "slice of one",
        "slice_by_index",
        {"x": X},
        {"begin": [0, -1, 0], "end": [0, 0, 0], "end_mask": [True, False, True], "squeeze_mask": [False, True, False]},
    )
    yield (
        "slice_update",
        "slice_update",
        {"x": X, "update": f(2, 1, 2)},
        {"begin": [0, 1, 0], "end": [2, 2, 4], "stride": [1, 1, 2]},
    )
    yield "tile", "tile", {"x": X}, {"reps": [1, 2, 3]}
    for mode in ("constant", "reflect", "replicate"):
        yield f"pad {mode}", "pad", {"x": X}, {"pad": [1, 2, 3, 0], "mode": mode, "constant_val": np.float32(0.5)}
    yield "band_part", "band_part", {"x": f(2, 4, 5)}, {"lower": 1, "upper": 2}
    yield "band_part of all below", "band_part", {"x": f(2, 4, 5)}, {"lower": -1, "upper": 0}
    yield "cumsum", "cumsum", {"x": X}, {"axis": 1}
    yield "cumsum from behind", "cumsum", {"x": IX}, {"axis": 1, "reverse": True}
    yield "argsort", "argsort", {"x": X}, {"axis": 1}
    yield "fill_like", "fill_like", {"ref_tensor": X}, {"value": np.float32(3)}
    yield "gather", "gather", {"x": X, "indices": i(2, 2, low=0, high=3)}, {"axis": 1}
    yield "gather in batches", "gather", {"x": X, "indices": i(2, 3, low=0, high=3)}, {"axis": 1, "batch_dims": 1}
    yield "gather_along_axis", "gather_along_axis", {"x": X, "indices": i(2, 2, 4, low=0, high=3)}, {"axis": 1}
    yield "attention", "scaled_dot_product_attention", {"query": X, "key": f(2, 5, 4), "value": f(2, 5, 6)}, {}
    yield (
        "attention under a mask",
        "scaled_dot_product_attention",
        {"query": X, "key": f(2, 5, 4), "value": f(2, 5, 6)},
        {"attn_mask": R.random((3, 5)) > 0.3},
    )
    for dtype in ("int8", "uint8"):
        zero = np.array([3, 0, 7], dtype)
        scale = f(3, low=0.01, high=0.05)
        yield (
            f"quantize {dtype}",
            "quantize",
            {"input": X},
            {"scale": scale, "zero_point": zero, "axis": 1, "output_dtype": dtype},
        )
        yield (
            f"quantize {dtype} alike",
            "quantize",
            {"input": HALVES * 2},
            {"scale": np.float32(2), "output_dtype": dtype},
        )
    for dtype in ("fp32", "int32", "bool", "int8", "uint8", "int16", "uint16"):
        yield f"cast to {dtype}", "cast", {"x": np.round(np.abs(X)) * 20.7}, {"dtype": dtype}
    yield "cast of negative", "cast", {"x": np.array([-1.9, -0.5, 0.5, 1.9], np.float32)}, {"dtype": "int32"}


CASES = {name: SimpleNamespace(op=op, inputs=inputs, constants=constants) for name, op, inputs, constants in cases()}
# `value_inference` of a case, and how it is compared: these read what they are given as something else.
HALF = [
    name
    for name, one in CASES.items()
    if all(x.dtype == np.float32 for x in one.inputs.values())
    and not one.op.startswith(("quantize", "cast", "reduce_arg", "argsort", "floor_div", "mod", "fill_like", "shape"))
    and one.op not in COMPARE
]


def key(name):
    return name.replace(" ", "_").replace("-", "_")


def build(names, half):
    """For `Packages.operations`: every case with its inputs from outside, returned under its name."""

    def cast(value):
        return value.astype(np.float16) if half and getattr(value, "dtype", None) == np.float32 else value

    given = {f"{key(name)}_{at}": cast(x) for name in names for at, x in CASES[name].inputs.items()}

    def make(mb, holders):
        made = {}
        for name in names:
            one = CASES[name]
            arguments = {at: holders[f"{key(name)}_{at}"] for at in one.inputs}
            constants = {at: cast(value) for at, value in one.constants.items()}
            value = getattr(mb, one.op)(**arguments, **constants)
            # Types that no output may have are read as int32.
            kind = str(value.dtype)
            if any(wide in kind for wide in ("int8", "int16", "uint", "bool")):
                value = mb.cast(x=value, dtype="int32")
            made[f"{key(name)}_out"] = value
        return made

    return make, given


def inferred(name, half):
    """What coremltools computes for a case of constants; for fp16 in fp32 from fp16 inputs, not rounded."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, types

    one = CASES[name]

    def cast(value):
        half_of = half and getattr(value, "dtype", None) == np.float32
        return value.astype(np.float16).astype(np.float32) if half_of else value

    with Function({"unused": mb.placeholder((1,), dtype=types.fp32)}, opset_version=ct.target.iOS18):
        arguments = {at: cast(value) for at, value in (one.inputs | one.constants).items()}
        value = getattr(mb, one.op)(**arguments)
        return np.asarray(value.val)


@pytest.fixture(scope="module")
def single(packages):
    make, given = build(list(CASES), False)
    return Program.open(packages.operations(make, given))(given)


@pytest.fixture(scope="module")
def half(packages):
    make, given = build(HALF, True)
    return Program.open(packages.operations(make, given))(given)


@pytest.mark.parametrize("name", CASES)
def test_operation_is_its_value_inference(single, name):
    expected, found = inferred(name, False), single[f"{key(name)}_out"]
    assert found.shape == expected.shape
    if found.dtype.kind != "f" or CASES[name].op in ("round", "ceil", "floor", "transpose", "pad", "gather"):
        np.testing.assert_array_equal(found, expected.astype(found.dtype))
    else:
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", HALF)
def test_fp16_is_the_fp32_result_rounded_once(half, name):
    found = half[f"{key(name)}_out"]
    exact = inferred(name, True).astype(np.float64)
    assert found.dtype == np.float16
    # Half a step of fp16, and what fp32 leaves open (sums in another order, which may cancel).
    step = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
    assert np.all(np.abs(found.astype(np.float64) - exact) <= 0.5 * step + 2e-6 * np.maximum(1, np.abs(exact)))


def by_torch():
    """(name, operation, inputs, constants, what torch computes)"""
    t = torch.from_numpy
    x1, x2, x3 = f(2, 4, 9), f(2, 4, 9, 8), f(1, 4, 5, 6, 7)
    w = f(6, 2, 3, 2)
    yield (
        "conv 1d",
        "conv",
        {"x": x1},
        {"weight": f(6, 4, 3), "bias": f(6)},
        lambda x, weight, bias: F.conv1d(x, weight, bias),
    )
    yield (
        "conv 2d",
        "conv",
        {"x": x2},
        {"weight": w, "strides": [2, 1], "pad_type": "custom", "pad": [1, 0, 2, 1], "dilations": [1, 2], "groups": 2},
        lambda x, weight, **_: F.conv2d(F.pad(x, (2, 1, 1, 0)), weight, None, (2, 1), 0, (1, 2), 2),
    )
    yield (
        "conv 3d",
        "conv",
        {"x": x3},
        {"weight": f(4, 1, 3, 1, 3), "pad_type": "custom", "pad": [1, 1, 0, 0, 1, 1], "groups": 4},
        lambda x, weight, **_: F.conv3d(x, weight, None, 1, (1, 0, 1), 1, 4),
    )
    for kind, pads in (("same", (0, 1, 1, 1)), ("same_lower", (1, 0, 1, 1))):
        # Height 9, kernel 3, stride 2: 2 to add; width 8, kernel 3, stride 2: 1 to add.
        yield (
            f"conv {kind}",
            "conv",
            {"x": x2},
            {"weight": f(3, 4, 3, 3), "strides": [2, 2], "pad_type": kind},
            lambda x, weight, pads=pads, **_: F.conv2d(F.pad(x, pads), weight, None, 2),
        )
    yield (
        "conv with weights of its own",
        "conv",
        {"x": x2, "weight": w},
        {"groups": 2},
        lambda x, weight, groups: F.conv2d(x, weight, groups=groups),
    )
    yield (
        "conv_transpose",
        "conv_transpose",
        {"x": x2},
        {
            "weight": f(4, 3, 4, 3),
            "bias": f(6),
            "strides": [2, 3],
            "pad_type": "custom",
            "pad": [1, 1, 0, 0],
            "groups": 2,
        },
        lambda x, weight, bias, **_: F.conv_transpose2d(x, weight, bias, (2, 3), (1, 0), 0, 2),
    )
    yield (
        "conv_transpose 1d",
        "conv_transpose",
        {"x": x1},
        {"weight": f(4, 3, 3), "dilations": [2]},
        lambda x, weight, **_: F.conv_transpose1d(x, weight, dilation=2),
    )
    yield (
        "conv_transpose to a shape",
        "conv_transpose",
        {"x": x2},
        {
            "weight": f(4, 3, 3, 3),
            "strides": [2, 2],
            "pad_type": "custom",
            "pad": [1, 0, 1, 0],
            "output_shape": [2, 3, 18, 16],
        },
        lambda x, weight, **_: F.conv_transpose2d(x, weight, None, 2, 1, 1),
    )
    for op, function in (("max_pool", F.max_pool2d), ("avg_pool", F.avg_pool2d)):
        yield (
            op,
            op,
            {"x": x2},
            {"kernel_sizes": [3, 2], "strides": [2, 1], "pad_type": "custom", "pad": [1, 1, 1, 1]},
            lambda x, function=function, **_: function(x, (3, 2), (2, 1), 1),
        )
    yield (
        "avg_pool without padding",
        "avg_pool",
        {"x": x2},
        {"kernel_sizes": [3, 2], "pad_type": "custom", "pad": [1, 1, 1, 1], "exclude_padding_from_average": True},
        lambda x, **_: F.avg_pool2d(x, (3, 2), 1, 1, count_include_pad=False),
    )
    yield (
        "l2_pool",
        "l2_pool",
        {"x": x2},
        {"kernel_sizes": [2, 2], "pad_type": "valid"},
        lambda x, **_: F.lp_pool2d(x, 2, 2, 1),
    )
    stats = {"mean": f(4), "variance": f(4, low=0.5), "gamma": f(4), "beta": f(4), "epsilon": np.float32(1e-3)}
    yield (
        "batch_norm",
        "batch_norm",
        {"x": x2},
        stats,
        lambda x, mean, variance, gamma, beta, epsilon: F.batch_norm(x, mean, variance, gamma, beta, eps=1e-3),
    )
    yield (
        "instance_norm",
        "instance_norm",
        {"x": x2},
        {"gamma": f(4), "beta": f(4), "epsilon": np.float32(1e-3)},
        lambda x, gamma, beta, epsilon: F.instance_norm(x, weight=gamma, bias=beta, eps=1e-3),
    )
    yield "silu", "silu", {"x": X}, {}, lambda x: F.silu(x)
    yield (
        "local_response_norm",
        "local_response_norm",
        {"x": x2},
        {"size": 3},
        lambda x, size: F.local_response_norm(x, 3, 1e-4, 0.75, 1.0),
    )
    yield (
        "pixel_shuffle",
        "pixel_shuffle",
        {"x": f(1, 8, 3, 2)},
        {"upscale_factor": 2},
        lambda x, **_: F.pixel_shuffle(x, 2),
    )
    yield (
        "pixel_unshuffle",
        "pixel_unshuffle",
        {"x": f(1, 2, 4, 6)},
        {"downscale_factor": np.uint32(2)},
        lambda x, **_: F.pixel_unshuffle(x, 2),
    )
    yield (
        "space_to_depth",
        "space_to_depth",
        {"x": f(1, 1, 4, 6)},
        {"block_size": 2},
        lambda x, **_: F.pixel_unshuffle(x, 2),
    )
    yield (
        "depth_to_space",
        "depth_to_space",
        {"x": f(1, 4, 2, 3)},
        {"block_size": 2},
        lambda x, **_: F.pixel_shuffle(x, 2),
    )
    yield (
        "upsample_nearest",
        "upsample_nearest_neighbor",
        {"x": x2},
        {"scale_factor_height": np.float32(2.0), "scale_factor_width": np.float32(3.0)},
        lambda x, **_: F.interpolate(x, scale_factor=(2.0, 3.0)),
    )
    for corners in (True, False):
        yield (
            f"upsample_bilinear {corners}",
            "upsample_bilinear",
            {"x": x2},
            {"scale_factor_height": 3, "scale_factor_width": 2, "align_corners": corners},
            lambda x, corners=corners, **_: F.interpolate(x, size=(27, 16), mode="bilinear", align_corners=corners),
        )
    for mode, corners in (("STRICT_ALIGN_CORNERS", True), ("UNALIGN_CORNERS", False)):
        yield (
            f"resize_bilinear {mode}",
            "resize_bilinear",
            {"x": x2},
            {"target_size_height": 5, "target_size_width": 11, "sampling_mode": mode},
            lambda x, corners=corners, **_: F.interpolate(x, size=(5, 11), mode="bilinear", align_corners=corners),
        )
    yield (
        "resize",
        "resize",
        {"x": x2},
        {"shape": [4, 0, 12], "resized_dims": np.uint32(2), "sampling_mode": "UNALIGN_CORNERS"},
        lambda x, **_: F.interpolate(x, size=(9, 12), mode="bilinear"),
    )
    yield (
        "sliding_windows",
        "sliding_windows",
        {"x": x1},
        {"axis": 2, "size": 3, "stride": 2},
        lambda x, **_: x.unfold(2, 3, 2),
    )
    yield "crop", "crop", {"x": x2}, {"crop_height": [1, 2], "crop_width": [0, 3]}, lambda x, **_: x[:, :, 1:7, :5]
    yield (
        "cumsum without the last",
        "cumsum",
        {"x": X},
        {"axis": 1, "exclusive": True},
        lambda x, **_: F.pad(x, (0, 0, 1, 0)).cumsum(1)[:, :-1],
    )
    at = t(np.array([[0, 1], [1, 2], [0, 0]], np.int32))
    yield (
        "gather_nd",
        "gather_nd",
        {"x": X, "indices": at.numpy()},
        {},
        lambda x, indices: x[indices[:, 0].long(), indices[:, 1].long()],
    )
    yield (
        "gather_nd in batches",
        "gather_nd",
        {"x": X, "indices": np.array([[[0], [2]], [[1], [1]]], np.int32)},
        {"batch_dims": 1},
        lambda x, indices, **_: torch.stack([x[0][[0, 2]], x[1][[1, 1]]]),
    )
    for mode, reduce in (("add", "sum"), ("mul", "prod"), ("max", "amax"), ("min", "amin")):
        yield (
            f"scatter {mode}",
            "scatter",
            {"data": X, "updates": f(2, 3, 4)},
            {"indices": np.array([2, 0, 2], np.int32), "axis": 1, "mode": mode},
            lambda data, updates, reduce=reduce, **_: data.scatter_reduce(
                1, torch.tensor([2, 0, 2]).view(1, 3, 1).expand(2, 3, 4), updates, reduce
            ),
        )
    yield (
        "scatter_along_axis",
        "scatter_along_axis",
        {"data": X, "updates": f(2, 2, 4)},
        {"indices": np.broadcast_to(np.array([[2], [0]], np.int32), (2, 2, 4)).copy(), "axis": 1, "mode": "update"},
        lambda data, updates, indices, **_: data.scatter(1, indices.long(), updates),
    )
    yield (
        "scatter_nd",
        "scatter_nd",
        {"data": X, "updates": f(3, 4)},
        {"indices": at.numpy(), "mode": "sub"},
        lambda data, updates, indices, **_: data.index_put(
            (indices[:, 0].long(), indices[:, 1].long()), -updates, True
        ),
    )
    yield (
        "one_hot",
        "one_hot",
        {"indices": i(2, 3, low=0, high=4)},
        {"one_hot_vector_size": 4, "axis": 1, "on_value": 5, "off_value": -1},
        (lambda indices, **_: F.one_hot(indices.long(), 4).movedim(-1, 1).int() * 6 - 1),
    )
    yield "range_1d", "range_1d", {"end": np.array(9, np.int32)[None]}, {}, None
    yield (
        "select",
        "select",
        {"a": X, "b": f(2, 3, 4)},
        {"cond": R.random((2, 3, 4)) > 0.5},
        lambda a, b, cond: torch.where(cond, a, b),
    )
    yield (
        "einsum",
        "einsum",
        {"v0": f(2, 3, 4, 5), "v1": f(2, 5, 4, 6)},
        {"equation": "nchw,nwhu->nchu"},
        lambda v0, v1, **_: torch.einsum("nchw,nwhu->nchu", v0, v1),
    )
    yield "concat", "concat", {"v0": X, "v1": f(2, 3, 4)}, {"axis": -2}, lambda v0, v1, **_: torch.cat([v0, v1], 1)
    yield (
        "concat in turns",
        "concat",
        {"v0": X, "v1": f(2, 3, 4)},
        {"axis": 1, "interleave": True},
        lambda v0, v1, **_: torch.stack([v0, v1], 2).flatten(1, 2),
    )
    yield (
        "thresholded_relu",
        "thresholded_relu",
        {"x": X},
        {"alpha": np.float32(0.5)},
        lambda x, alpha: torch.where(x >= 0.5, x, 0.0),
    )
    yield (
        "resize_nearest_neighbor",
        "resize_nearest_neighbor",
        {"x": x2},
        {"target_size_height": 9, "target_size_width": 24},
        lambda x, **_: F.interpolate(x, size=(9, 24)),
    )
    # tf.space_to_batch_nd and tf.batch_to_space_nd, by their definitions.
    yield (
        "space_to_batch",
        "space_to_batch",
        {"x": f(2, 3, 3, 4)},
        {"block_shape": [2, 2], "paddings": [[1, 0], [0, 2]]},
        lambda x, **_: torch.cat([F.pad(x, (0, 2, 1, 0))[:, :, a::2, b::2] for a in (0, 1) for b in (0, 1)]),
    )
    yield (
        "batch_to_space",
        "batch_to_space",
        {"x": f(8, 3, 2, 3)},
        {"block_shape": [2, 2], "crops": [[1, 0], [0, 2]]},
        lambda x, **_: F.pixel_shuffle(torch.stack(x.split(2), 2).flatten(1, 2), 2)[:, :, 1:, :4],
    )
    yield "stack", "stack", {"v0": X, "v1": f(2, 3, 4)}, {"axis": -1}, lambda v0, v1, **_: torch.stack([v0, v1], -1)


TORCH = {one[0]: one for one in by_torch() if one[-1] is not None}
# The sums of these go by another path when they are accumulated in fp16.
SUMMING = [name for name, one in TORCH.items() if one[1] in ("conv", "conv_transpose", "einsum", "instance_norm")]


@pytest.fixture(scope="module")
def torched(packages):
    def run(dtype, names):
        def cast(value):
            return value.astype(dtype) if getattr(value, "dtype", None) == np.float32 else value

        given = {f"{key(name)}_{at}": cast(x) for name in names for at, x in TORCH[name][2].items()}

        def make(mb, holders):
            made = {}
            for name in names:
                _, op, inputs, constants, _ = TORCH[name]
                arguments = {at: holders[f"{key(name)}_{at}"] for at in inputs}
                if "v0" in arguments:
                    arguments = {"values": [arguments["v0"], arguments["v1"]]}
                constants = {at: value if "scale_factor" in at else cast(value) for at, value in constants.items()}
                made[f"{key(name)}_out"] = getattr(mb, op)(**arguments, **constants)
            return made

        path = packages.operations(make, given)
        return {
            "fp32": Program.open(path)(given),
            "fp16": Program.open(path, accumulate="fp16")(given),
        }

    return {"single": run(np.float32, list(TORCH)), "half": run(np.float16, SUMMING)}


def wanted(name, dtype):
    _, _, inputs, constants, function = TORCH[name]

    def read(value):
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.astype(dtype).astype(np.float32) if value.dtype == np.float32 else value)
        return value

    return function(**{at: read(value) for at, value in (inputs | constants).items()}).numpy()


@pytest.mark.parametrize("name", TORCH)
def test_operation_is_torchs(torched, name):
    found = torched["single"]["fp32"][f"{key(name)}_out"]
    np.testing.assert_allclose(found, wanted(name, np.float32), rtol=2e-6, atol=2e-6)
    # Nothing but fp16 is accumulated in fp16.
    np.testing.assert_array_equal(torched["single"]["fp16"][f"{key(name)}_out"], found)


@pytest.mark.parametrize("name", SUMMING)
def test_sums_in_fp16_are_worse_but_the_same_sums(packages, torched, name):
    expected = wanted(name, np.float16)
    once, always = (packages.sqnr(expected, torched["half"][kind][f"{key(name)}_out"]) for kind in ("fp32", "fp16"))
    assert once > 68
    assert 45 < always < once + 0.5


def run(packages, build, given, target="iOS18"):
    return Program.open(packages.operations(build, given, target))(given)


def test_several_outputs(packages):
    def build(mb, holders):
        values, places = mb.topk(x=holders["x"], k=2, axis=1, ascending=True)
        a, b = mb.split(x=holders["x"], split_sizes=[1, 2], axis=1)
        c, d = mb.split(x=holders["x"], num_splits=2, axis=2)
        where = mb.non_zero(x=holders["n"])
        return {"values": values, "places": places, "a": a, "b": b, "c": c, "d": d, "where": where}

    counts = np.array([[0, 3], [1, 0]], np.int32)
    found = run(packages, build, {"x": X, "n": counts})
    np.testing.assert_array_equal(found["places"], np.argsort(X, 1)[:, :2])
    np.testing.assert_array_equal(found["values"], np.sort(X, 1)[:, :2])
    np.testing.assert_array_equal(np.concatenate([found["a"], found["b"]], 1), X)
    np.testing.assert_array_equal(np.concatenate([found["c"], found["d"]], 2), X)
    np.testing.assert_array_equal(found["where"], np.transpose(np.nonzero(counts)))


def test_logic(packages):
    def build(mb, holders):
        a, b = (mb.greater(x=holders[name], y=np.float32(0)) for name in "xy")
        made = {name: getattr(mb, f"logical_{name}")(x=a, y=b) for name in ("and", "or", "xor")}
        made["not"] = mb.logical_not(x=a)
        return {f"{name}_out": mb.cast(x=value, dtype="int32") for name, value in made.items()}

    y = f(2, 3, 4)
    found = run(packages, build, {"x": X, "y": y})
    for name in ("and", "or", "xor"):
        np.testing.assert_array_equal(found[f"{name}_out"], getattr(np, f"logical_{name}")(X > 0, y > 0))
    np.testing.assert_array_equal(found["not_out"], ~(X > 0))


def test_reshape_like(packages):
    def build(mb, holders):
        like = (holders["x"], holders["y"])
        made = mb.reshape_like(x=holders["x"], ref_tensors=like, begins=(0, 1), ends=(1, 0), end_masks=(False, True))
        return {"made": made}

    found = run(packages, build, {"x": X, "y": f(5, 12)})
    np.testing.assert_array_equal(found["made"], X.reshape(2, 12))


def test_shapes_that_are_computed(packages):
    def build(mb, holders):
        shape = mb.shape(x=holders["x"])
        rows = mb.gather(x=shape, indices=np.int32([0]), axis=0)
        turned = mb.concat(values=[np.int32([-1]), rows], axis=0)
        end = mb.squeeze(x=rows)
        return {
            "reshaped": mb.reshape(x=holders["x"], shape=turned),
            "range": mb.range_1d(start=np.int32(0), end=end, step=np.int32(1)),
            "filled": mb.fill(shape=shape, value=np.float32(2.5)),
        }

    found = run(packages, build, {"x": X})
    np.testing.assert_array_equal(found["reshaped"], X.reshape(-1, 2))
    np.testing.assert_array_equal(found["range"], [0, 1])
    np.testing.assert_array_equal(found["filled"], np.full(X.shape, 2.5, np.float32))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_every_step_of_quantization_saturates_and_returns(packages, dtype, kind):
    """All steps, all halves between them and what lies beyond, per channel: round half to even, clip, and back."""
    steps = np.arange(-600, 601, dtype=np.float64) / 2
    scale = np.array([0.5, 0.125], kind)
    zero = np.array([5, 0], dtype)
    x = (steps[None] * scale[:, None].astype(np.float64)).astype(kind)

    def build(mb, holders):
        quantized = mb.quantize(input=holders["x"], scale=scale, zero_point=zero, axis=0, output_dtype=dtype)
        back = mb.dequantize(input=quantized, scale=scale, zero_point=zero, axis=0)
        return {"steps": mb.cast(x=quantized, dtype="int32"), "back": back}

    found = run(packages, build, {"x": x})
    limits = np.iinfo(dtype)
    expected = np.clip(np.round(steps)[None] + zero[:, None], limits.min, limits.max)
    np.testing.assert_array_equal(found["steps"], expected)
    np.testing.assert_array_equal(found["back"], ((expected - zero[:, None]) * scale[:, None]).astype(kind))


def test_every_fp16_number_is_kept_and_rounded_as_it_should_be(packages):
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]

    def build(mb, holders):
        return {
            "wide": mb.cast(x=holders["x"], dtype="fp32"),
            "double": mb.add(x=holders["x"], y=holders["x"]),
            "third": mb.mul(x=holders["x"], y=np.float16(1 / 3)),
            "halved": mb.cast(x=holders["w"], dtype="fp16"),
        }

    # Between each number and the next: the tie goes to the even one, and beyond 65504 + 16 there is infinity.
    ordered = np.sort(finite).astype(np.float64)
    middles = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)
    middles = np.concatenate([middles, np.float32([65519.996, 65520.0, -65520.0])])
    with np.errstate(over="ignore"):
        found = run(packages, build, {"x": finite, "w": middles})
        np.testing.assert_array_equal(found["wide"], finite.astype(np.float32))
        np.testing.assert_array_equal(found["double"], finite + finite)
        np.testing.assert_array_equal(found["third"], finite * np.float16(1 / 3))
        np.testing.assert_array_equal(found["halved"], middles.astype(np.float16))
    assert np.isposinf(found["halved"][-2]) and found["halved"][-3] == np.float16(65504)


REFUSED = {
    "an index outside": lambda mb, x, n: mb.gather(x=x, indices=mb.add(x=n, y=np.int32(9)), axis=0),
    "division of integers by zero": lambda mb, x, n: mb.floor_div(x=n, y=mb.sub(x=n, y=n)),
    "a cast out of range": lambda mb, x, n: mb.cast(x=mb.mul(x=x, y=np.float32(1e12)), dtype="int32"),
    "a cast of what is no number": lambda mb, x, n: mb.cast(x=mb.log(x=mb.sub(x=x, y=np.float32(99))), dtype="int32"),
    "a fractional nearest neighbour": lambda mb, x, n: mb.upsample_nearest_neighbor(
        x=x, scale_factor_height=np.float32(1.5), scale_factor_width=np.float32(1.0)
    ),
    "division of integers": lambda mb, x, n: mb.real_div(x=n, y=n),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_defined_is_refused_with_the_operation(packages, what):
    given = {"x": f(2, 4, 4, low=1), "n": i(3, low=1)}
    with pytest.raises(ProgramError, match=r"operation `\w+` \(\w+\) of `made\d+.mlpackage`"):
        run(packages, lambda mb, holders: {"y": REFUSED[what](mb, holders["x"], holders["n"])}, given)


def test_every_operation_is_tested():
    tested = {one.op for one in CASES.values()} | {one[1] for one in TORCH.values()}
    tested |= {"topk", "split", "non_zero", "fill", "range_1d", "dequantize", "identity", "reshape_like"}
    tested |= {"logical_and", "logical_or", "logical_xor", "logical_not"}
    beside = {  # in test_networks.py, test_compressed.py and test_state.py
        "read_state",
        "write_state",
        "constexpr_affine_dequantize",
        "constexpr_blockwise_shift_scale",
        "constexpr_cast",
        "constexpr_lut_to_dense",
        "constexpr_lut_to_sparse",
        "constexpr_sparse_blockwise_shift_scale",
        "constexpr_sparse_to_dense",
    }
    assert set(KERNELS) - tested - beside == set()
