"""Compressed weights: each `constexpr_*` operation against what coremltools materializes for it, bit for bit."""

import numpy as np
import pytest

from mlprogram import Program

R = np.random.default_rng(1)


def numbers(dtype, *shape):
    import coremltools as ct
    from coremltools.converters.mil.mil import types

    if dtype in ("fp16", "fp32"):
        return R.standard_normal(shape).astype(np.float16 if dtype == "fp16" else np.float32)
    bits, signed = int(dtype.strip("uint")), not dtype.startswith("u")
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    del ct
    return R.integers(low, high, shape).astype(types.nptype_from_builtin(types.string_to_builtin(dtype)))


def scales(dtype, *shape):
    return np.abs(numbers(dtype, *shape)) + numbers(dtype, 1).dtype.type(0.01)


def cases():
    """(name, deployment target, operation, its parameters)"""
    for dtype in ("int8", "uint8"):
        zero = numbers(dtype, 4)
        for scale in ("fp16", "fp32"):
            yield (
                f"affine {dtype} {scale}",
                "iOS16",
                "constexpr_affine_dequantize",
                {"quantized_data": numbers(dtype, 3, 4, 5), "zero_point": zero, "scale": scales(scale, 4), "axis": -2},
            )
    yield (
        "affine of one scale",
        "iOS16",
        "constexpr_affine_dequantize",
        {"quantized_data": numbers("int8", 3, 4), "zero_point": np.int8(3), "scale": np.float16(0.3), "axis": 0},
    )
    for bits in (1, 2, 4, 6, 8):
        packed = R.integers(0, 256, (15 * bits + 7) // 8).astype(np.uint8)
        if 15 * bits % 8:
            packed[-1] &= (1 << (15 * bits % 8)) - 1
        table = numbers("fp16", 1 << bits)
        yield (
            f"table of {bits} bits",
            "iOS16",
            "constexpr_lut_to_dense",
            {"indices": packed, "lut": table, "shape": np.uint32([3, 5])},
        )
    mask = R.random(27) > 0.6
    yield (
        "mask of bits",
        "iOS16",
        "constexpr_sparse_to_dense",
        {
            "nonzero_data": numbers("fp16", int(mask.sum())),
            "mask": np.packbits(mask, bitorder="little"),
            "shape": np.uint32([3, 9]),
        },
    )
    for target in ("iOS16", "iOS18"):
        yield f"cast {target}", target, "constexpr_cast", {"source_val": numbers("fp16", 4, 5), "output_dtype": "fp32"}
    for dtype in ("int4", "uint4", "int8", "uint8", "fp16"):
        for scale in ("fp16", "fp32"):
            data = {"data": numbers(dtype, 6, 8), "scale": scales(scale, 3, 2), "offset": numbers(dtype, 3, 2)}
            yield f"blocks {dtype} {scale}", "iOS18", "constexpr_blockwise_shift_scale", data
    yield (
        "blocks without offset",
        "iOS18",
        "constexpr_blockwise_shift_scale",
        {"data": numbers("int4", 6, 8), "scale": scales("fp16", 6, 1)},
    )
    for bits in (1, 2, 3, 4, 6, 8):
        yield (
            f"tables of {bits} bits",
            "iOS18",
            "constexpr_lut_to_dense",
            {"indices": numbers(f"uint{bits}", 6, 7), "lut": numbers("fp16", 3, 1, 1 << bits, 1)},
        )
    for axis in (0, 1, -1):
        yield (
            f"vectors along {axis}",
            "iOS18",
            "constexpr_lut_to_dense",
            {
                "indices": numbers("uint2", 4, 3, 5),
                "lut": numbers("fp32", 1, 1, 1, 4, 2),
                "vector_axis": np.int32(axis),
            },
        )
    places = (R.random((4, 6)) > 0.5).astype(numbers("uint1", 1).dtype)
    count = int(places.astype(np.uint8).sum())
    for dtype in ("int4", "uint4", "int8", "fp16", "fp32"):
        yield (
            f"sparse {dtype}",
            "iOS18",
            "constexpr_sparse_to_dense",
            {"nonzero_data": numbers(dtype, count), "mask": places},
        )


CASES = {one[0]: one for one in cases()}


@pytest.mark.parametrize("name", CASES)
def test_weight_is_what_coremltools_materializes(packages, name):
    _, target, op, parameters = CASES[name]
    kept = []

    def build(mb, holders):
        value = getattr(mb, op)(**parameters)
        kept.append(value.op.materialized_val_inference())
        if value.dtype.__name__ not in ("fp16", "fp32"):
            # Nothing takes these but an operation that dequantizes them.
            scale = np.ones([1] * value.rank, np.float32)
            kept[0] = np.asarray(kept[0]).astype(np.float32)
            value = mb.constexpr_blockwise_shift_scale(data=value, scale=scale)
        zero = mb.cast(x=holders["zero"], dtype="fp16" if kept[0].dtype == np.float16 else "fp32")
        return {"weight": mb.add(x=value, y=zero)}

    given = {"zero": np.zeros(1, np.float32)}
    found = Program.open(packages.operations(build, given, target))(given)["weight"]
    assert found.dtype == kept[0].dtype
    np.testing.assert_array_equal(found, kept[0])


def test_sparse_and_then_quantized_or_looked_up(packages):
    mask = (R.random((4, 6)) > 0.5).astype(numbers("uint1", 1).dtype)
    count = int(mask.astype(np.uint8).sum())
    expected = {}

    def build(mb, holders):
        made = {}
        places, values = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask,
            nonzero_data=numbers("int8", count),
            scale=scales("fp32", 2, 6),
            offset=numbers("int8", 2, 6),
        )
        made["scaled"] = mb.constexpr_sparse_to_dense(nonzero_data=values, mask=places)
        places, values = mb.constexpr_lut_to_sparse(
            indices_mask=mask, indices_nonzero_data=numbers("uint2", count), lut=numbers("fp32", 2, 1, 4, 1)
        )
        made["looked up"] = mb.constexpr_sparse_to_dense(nonzero_data=values, mask=places)
        places, values = mb.constexpr_lut_to_sparse(
            indices_mask=mask,
            indices_nonzero_data=numbers("uint2", count),
            lut=numbers("fp32", 1, 1, 4, 3),
            vector_axis=np.int32(1),
        )
        made["vectors"] = mb.constexpr_sparse_to_dense(nonzero_data=values, mask=places)
        for name, value in made.items():
            expected[name] = value.op.materialized_val_inference()
        return {name.replace(" ", "_"): mb.add(x=value, y=holders["zero"]) for name, value in made.items()}

    given = {"zero": np.zeros(1, np.float32)}
    found = Program.open(packages.operations(build, given))(given)
    for name, value in expected.items():
        assert value.any()
        np.testing.assert_array_equal(found[name.replace(" ", "_")], value)
