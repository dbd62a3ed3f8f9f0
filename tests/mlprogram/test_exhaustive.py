"""Every fp16 number through every function of one number, and every 8-bit code under many scales and zero points.

What is expected is computed here in fp64, from the documented formula, and rounded once.
"""

import numpy as np
import pytest
import torch

from mlprogram import Program, ProgramError
from mlprogram.blob import unpack
from mlprogram.kernel import KERNELS
from mlprogram.tensor_type import BY_NAME

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
EPSILON = np.float16(2**-10)
A, B = np.float16(0.25), np.float16(0.75)


def softplus(x):
    return torch.where(x > 0, x, 0.0) + torch.log1p(torch.exp(-x.abs()))


# Operation, its constants, and its formula in fp64.
FUNCTIONS = {
    "abs": ({}, torch.abs),
    "acos": ({}, torch.acos),
    "asin": ({}, torch.asin),
    "atan": ({}, torch.atan),
    "atanh": ({}, torch.atanh),
    "ceil": ({}, torch.ceil),
    "clamped_relu": ({"alpha": A, "beta": B}, lambda x: torch.where(x >= 0, x, x * 0.25).clamp(max=0.75)),
    "clip": ({"alpha": A, "beta": B}, lambda x: x.clamp(0.25, 0.75)),
    "cos": ({}, torch.cos),
    "cosh": ({}, torch.cosh),
    "elu": ({"alpha": A}, lambda x: torch.where(x > 0, x, 0.25 * torch.expm1(x))),
    "erf": ({}, torch.erf),
    "exp": ({}, torch.exp),
    "exp2": ({}, torch.exp2),
    "floor": ({}, torch.floor),
    "gelu": ({"mode": "EXACT"}, lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
    "inverse": ({"epsilon": EPSILON}, lambda x: 1 / (x + 2**-10)),
    "leaky_relu": ({"alpha": A}, lambda x: torch.where(x >= 0, x, x * 0.25)),
    "linear_activation": ({"alpha": A, "beta": B}, lambda x: x * 0.25 + 0.75),
    "log": ({"epsilon": EPSILON}, lambda x: torch.log(x + 2**-10)),
    "relu": ({}, torch.relu),
    "relu6": ({}, lambda x: x.clamp(0, 6)),
    "round": ({}, torch.round),
    "rsqrt": ({"epsilon": EPSILON}, lambda x: 1 / torch.sqrt(x + 2**-10)),
    "scaled_tanh": ({"alpha": A, "beta": B}, lambda x: 0.25 * torch.tanh(0.75 * x)),
    "sigmoid": ({}, torch.sigmoid),
    "sigmoid_hard": ({"alpha": A, "beta": B}, lambda x: (x * 0.25 + 0.75).clamp(0, 1)),
    "sign": ({}, lambda x: torch.where(x.isnan(), x, x.sign())),
    "silu": ({}, lambda x: x / (1 + torch.exp(-x))),
    "sin": ({}, torch.sin),
    "sinh": ({}, torch.sinh),
    "softplus": ({}, softplus),
    "softsign": ({}, lambda x: x / (1 + x.abs())),
    "sqrt": ({}, torch.sqrt),
    "square": ({}, lambda x: x * x),
    "tan": ({}, torch.tan),
    "tanh": ({}, torch.tanh),
    "threshold": ({"alpha": A}, lambda x: torch.where(x.isnan(), x, x.clamp(min=0.25))),
    "thresholded_relu": ({"alpha": A}, lambda x: torch.where(x >= 0.25, x, 0.0)),
}
EXACT = {"abs", "ceil", "clip", "floor", "relu", "relu6", "round", "sign", "square", "threshold"}


@pytest.fixture(scope="module")
def functions(packages):
    def build(mb, holders):
        return {f"{op}_of": getattr(mb, op)(x=holders["x"], **constants) for op, (constants, _) in FUNCTIONS.items()}

    return Program.open(packages.operations(build, {"x": EVERY}))({"x": EVERY})


@pytest.mark.parametrize("op", FUNCTIONS)
def test_every_fp16_number_through_a_function(functions, op):
    found = functions[f"{op}_of"]
    exact = FUNCTIONS[op][1](torch.from_numpy(EVERY).double()).numpy()
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float16)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    known = ~np.isnan(expected)
    if op in EXACT:
        np.testing.assert_array_equal(found[known], expected[known])
        return
    infinite = known & np.isinf(expected)
    np.testing.assert_array_equal(found[infinite], expected[infinite])
    finite = known & ~np.isinf(expected)
    # Half a step of fp16, and what fp32 adds to it: it may round to a tie, and terms may cancel.
    with np.errstate(over="ignore"):
        step = np.spacing(np.abs(expected[finite])).astype(np.float64)
    error = np.abs(found[finite].astype(np.float64) - exact[finite])
    assert np.all(error <= 0.5 * step + 1e-6 * np.maximum(np.abs(exact[finite]), 0.1))
    assert (found[finite] == expected[finite]).mean() > 0.99


def test_every_function_of_one_number_is_here():
    """An operation whose one required parameter is `x`, and whose elements are computed each by itself."""
    beside = {"softmax", "l2_norm", "cumsum", "inverse", "cast", "identity", "l2_pool"}
    shapes = {
        name
        for name, one in KERNELS.items()
        if name.startswith(("reduce_", "upsample", "resize")) or not one.arithmetic
    }
    beside |= {"layer_norm", "instance_norm", "local_response_norm", "resize_bilinear"}
    arithmetic = {
        name
        for name, one in KERNELS.items()
        if one.arithmetic and [key for key, value in one.parameters.items() if value.kind == "tensor"] == ["x"]
    }
    pools = {"avg_pool", "max_pool", "l2_pool"}
    assert arithmetic - set(FUNCTIONS) - shapes - beside - pools == set()


RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535), "int32": None}


def test_every_fp16_number_is_cast(packages):
    """Cut towards zero where the integer type has it; refused where it does not."""
    finite = EVERY[np.isfinite(EVERY)]
    cut = np.trunc(finite.astype(np.float64))
    inside = {}
    for dtype, limits in RANGES.items():
        inside[dtype] = finite if limits is None else finite[(cut >= limits[0]) & (cut <= limits[1])]
    given = {f"x_{dtype}": values for dtype, values in inside.items()} | {"every": EVERY}

    def build(mb, holders):
        made = {}
        for dtype in RANGES:
            value = mb.cast(x=holders[f"x_{dtype}"], dtype=dtype)
            made[dtype] = value if dtype == "int32" else mb.cast(x=value, dtype="int32")
        made["bool"] = mb.cast(x=mb.cast(x=holders["every"], dtype="bool"), dtype="int32")
        made["fp32"] = mb.cast(x=holders["every"], dtype="fp32")
        return {f"{name}_of": value for name, value in made.items()}

    found = Program.open(packages.operations(build, given))(given)
    for dtype, values in inside.items():
        np.testing.assert_array_equal(found[f"{dtype}_of"], np.trunc(values.astype(np.float64)))
    np.testing.assert_array_equal(found["bool_of"], EVERY != 0)
    np.testing.assert_array_equal(found["fp32_of"], EVERY.astype(np.float32))
    cast = KERNELS["cast"].function
    for dtype, limits in RANGES.items():
        outside = EVERY[~np.isfinite(EVERY)]
        if limits is not None:
            outside = np.concatenate([outside, finite[(cut < limits[0]) | (cut > limits[1])][::97]])
        for value in outside[::211]:
            with pytest.raises(ProgramError, match="outside of its range"):
                cast(torch.tensor([value]), dtype)


SCALES = np.array([2.0**-24, 6e-5, 0.01, 1 / 3, 0.5, 1, 3.7, 300, 65504], np.float16)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_every_fp16_number_is_quantized(packages, dtype):
    """Every number, infinities too, under scales from the least to the greatest, with zero points at the limits."""
    limits = np.iinfo(dtype)
    numbers = EVERY[~np.isnan(EVERY)]
    x = np.repeat(numbers[None], len(SCALES), 0)
    zero = np.resize(np.array([0, limits.min, limits.max, 7], dtype), len(SCALES))

    def build(mb, holders):
        made = mb.quantize(input=holders["x"], scale=SCALES, zero_point=zero, axis=0, output_dtype=dtype)
        return {"codes": mb.cast(x=made, dtype="int32")}

    found = Program.open(packages.operations(build, {"x": x}))({"x": x})["codes"]
    steps = np.rint(x.astype(np.float64) / SCALES.astype(np.float64)[:, None]) + zero.astype(np.float64)[:, None]
    np.testing.assert_array_equal(found, np.clip(steps, limits.min, limits.max))
    assert {limits.min, limits.max} <= set(np.unique(found))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_every_code_is_dequantized_under_every_zero_point(packages, dtype):
    """256 codes x 256 zero points along an axis, each place with a scale of its own: exact, then rounded once."""
    limits = np.iinfo(dtype)
    codes = np.arange(limits.min, limits.max + 1)
    scale = EVERY[(EVERY > 0) & np.isfinite(EVERY)][::124][:256]
    assert len(scale) == 256
    x = np.repeat(codes[None], 256, 0).astype(np.int32)

    def build(mb, holders):
        made = mb.cast(x=holders["x"], dtype=dtype)
        return {"numbers": mb.dequantize(input=made, scale=scale, zero_point=codes.astype(dtype), axis=0)}

    found = Program.open(packages.operations(build, {"x": x}))({"x": x})["numbers"]
    with np.errstate(over="ignore"):
        expected = ((codes[None] - codes[:, None]) * scale.astype(np.float64)[:, None]).astype(np.float16)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scale", [-0.5, 0.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    x, half = torch.ones(2), torch.tensor(scale)
    with pytest.raises(ProgramError, match="not positive"):
        KERNELS["quantize"].function(x, half, "int8")
    with pytest.raises(ProgramError, match="not positive"):
        KERNELS["dequantize"].function(x.to(torch.int8), half)
    for name, arguments in (
        ("constexpr_affine_dequantize", (x.to(torch.int8), torch.tensor(0, dtype=torch.int8), half, 0)),
        ("constexpr_blockwise_shift_scale", (x.to(torch.int8), half.view(1))),
    ):
        if scale == 0:
            # A weight of zeros has no other.
            assert not KERNELS[name].function(*arguments).any()
        else:
            with pytest.raises(ProgramError, match="not positive"):
                KERNELS[name].function(*arguments)


@pytest.mark.parametrize("name", ["uint1", "uint2", "uint3", "uint4", "uint6", "int4"])
def test_packed_elements_are_the_bits_from_the_lowest_on(name):
    """Every byte at every place of a run that is as long as it takes for elements to come back to a byte's edge."""
    element = BY_NAME[name]
    for place in range(3):
        for byte in range(256):
            data = bytearray([0xA5, 0x3C, 0x96])
            data[place] = byte
            whole = int.from_bytes(data, "little")
            count = 24 // element.bits
            found = unpack(np.frombuffer(bytes(data), np.uint8), element, count).tolist()
            codes = [(whole >> (at * element.bits)) & ((1 << element.bits) - 1) for at in range(count)]
            top = 1 << (element.bits - 1)
            assert found == [code - 2 * top if element.signed and code >= top else code for code in codes]
