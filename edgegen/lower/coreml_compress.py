"""Compressed weights and int8 arithmetic in an ML Program, with exactly the numbers of the plan.

Weights go through coremltools as floats, whatever it transposes or casts on the way, and become constant expressions
(`constexpr_*`) after its last pass: a float that is not what the numbers of the plan give, bit for bit, stops the
conversion. Operations are those of the MIL specification: `constexpr_affine_dequantize` and one table a weight from
iOS 16, `quantize` and `dequantize` from iOS 17, blocks of scales and of tables from iOS 18.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from coremltools import PassPipeline
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
from coremltools.converters.mil.mil.scope import ScopeSource
from numpy.typing import NDArray

from edgegen.errors import EdgegenError, UsageError
from edgegen.lower.stored_weight import StoredWeight
from edgegen.precision.plan import COMPRESSED, OpPlan

_PASS = "edgegen::compress_weights"
# Where an operation has what a plan compresses, and what it computes with.
_WEIGHT = {"conv": "weight", "conv_transpose": "weight", "linear": "weight", "matmul": "y"}
# Passes that scale weights or move scales, so that the numbers in the file would not be the plan's. Scales of norms and
# of neighbours are folded in our own graph, before a plan is made.
_CHANGES_NUMBERS = {
    "common::fuse_conv_scale",
    "common::fuse_conv_batchnorm",
    "common::distributive_quantized_binary_op_scale_normalization",
}


def check_target(quantized: Mapping[str, OpPlan], target: str) -> None:
    """UsageError for the first op whose precision an ML Program of `target` ("iOS17") cannot hold."""
    version = int(target.removeprefix("iOS"))
    for name, op in quantized.items():
        if op.precision == "w8a8-dynamic":
            raise UsageError(
                f"`{name}` is planned as w8a8-dynamic: Core ML has no int8 arithmetic with ranges found at run time",
                hint="plan `w8a8`, whose ranges are calibrated, or `w8`",
            )
        floor, what = _floor(op)
        if version < floor:
            raise UsageError(
                f"`{name}` is planned as {what}, which Core ML has from iOS {floor}; this target starts at {target}",
                hint=f'set `minimum_deployment_target` to "iOS{floor}" or plan {_instead(op)}',
            )


def _floor(op: OpPlan) -> tuple[int, str]:
    if op.precision == "w8a8":
        return 17, "w8a8"
    if op.form == "palette":
        return (18, f"{op.precision} with a table for every {op.group} channels") if op.group else (16, "a palette")
    if op.precision == "w4":
        return 18, "w4 with scales"
    return (18, f"{op.precision} with a scale for every {op.group} channels") if op.group else (16, op.precision)


def _instead(op: OpPlan) -> str:
    if op.precision == "w8a8":
        return '`precision = "w8"`'
    if op.form == "palette":
        return "`group = 0`, one table"
    return '`form = "palette"`' if op.precision == "w4" else "`group = 0`, one scale an output channel"


@dataclass
class Placed:
    """Where a planned op went: an operation, its parameter that is compressed, and the numbers in that layout."""

    operation: Any
    parameter: str = ""
    weight: StoredWeight | None = None

    @property
    def output(self) -> str:
        """What the operation computes is called so in the file."""
        return str(self.operation.outputs[0].name)


class CompressWeights(AbstractGraphPass):  # type: ignore[misc]
    """coremltools' pass of one conversion. `handles` are the numbers of the graph's calls by the node they came from;
    `placed` is filled by the nodes of `quantized`."""

    def __init__(
        self, quantized: Mapping[str, OpPlan], stored: Mapping[str, StoredWeight], handles: Mapping[int, str]
    ) -> None:
        self._quantized = quantized
        self._stored = stored
        self._handles = handles
        self._made: dict[tuple[str, int], Any] = {}
        self.placed: dict[str, Placed] = {}

    def pipeline(self) -> PassPipeline:
        """coremltools' default passes without those that change the plan's numbers, and this one after them."""
        PASS_REGISTRY.passes[_PASS] = self  # by instance: it holds what one conversion is about
        pipeline = PassPipeline.DEFAULT
        pipeline.remove_passes(_CHANGES_NUMBERS)
        pipeline.append_pass(_PASS)
        return pipeline

    def apply(self, prog: Any) -> None:
        for function in prog.functions.values():
            with function:
                for operation in list(function.operations):
                    self._compress(operation, function)

    def _compress(self, operation: Any, function: Any) -> None:
        if operation.op_type not in _WEIGHT:
            return
        numbers = operation.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE, ())
        names = {self._handles[number] for number in numbers if number in self._handles} & set(self._quantized)
        if not names:
            return
        if len(names) > 1 or names & set(self.placed):
            raise ValueError(f"`{operation.name}` and another operation come from {', '.join(sorted(names))}")
        (name,) = names
        place = self.placed[name] = Placed(operation)
        if name in self._stored:
            place.parameter = _WEIGHT[operation.op_type]
            old = operation.inputs[place.parameter]
            if old.val is None:
                raise ValueError(f"the weight of `{name}` is computed by {old.op.op_type}")
            place.weight = _laid_out(self._stored[name], old.val, name)
            new = self._constant_expression(place.weight, old, operation, function)
            operation.set_inputs(**{place.parameter: new})

    def _constant_expression(self, weight: StoredWeight, old: Any, operation: Any, function: Any) -> Any:
        key = (old.name, id(weight))
        if key not in self._made:
            blocks = function.opset_version >= _ios18()
            made = _blockwise if blocks else _whole
            new = made(weight, old.val.dtype, f"{old.name}_w{weight.bits}", operation)
            # Every operation must say where it comes from: these, where their reader does.
            for one in (new.op, *(value.op for value in new.op.get_flattened_inputs())):
                one.scopes = copy.copy(operation.scopes)
            self._made[key] = new
        return self._made[key]


def _ios18() -> Any:
    import coremltools as ct

    return ct.target.iOS18


def _laid_out(weight: StoredWeight, value: NDArray[Any], name: str) -> StoredWeight:
    """`weight` in the layout that the converter gave `value`. ValueError when it is not those numbers."""
    candidates = [weight] if weight.codes.shape == value.shape else []
    if value.ndim == 2 and weight.codes.ndim == 2:
        candidates.append(weight.transposed())
    elif not candidates:
        candidates.append(weight.reshaped(value.shape))
    for one in candidates:
        if one.codes.shape == value.shape and np.array_equal(one.value().astype(value.dtype), value):
            return one
    raise ValueError(f"coremltools changed the weight of `{name}`: it is not what the plan's numbers give")


def _scale(scales: NDArray[np.float32], dtype: Any, name: str) -> NDArray[Any]:
    found = scales.astype(dtype)
    if not np.isfinite(found).all() or bool(((found == 0) & (scales != 0)).any()):
        raise ValueError(f"a scale of `{name}` is outside of {dtype}")
    return found


def _whole(weight: StoredWeight, dtype: Any, name: str, before: Any) -> Any:
    """Of iOS 16: one scale a channel, or one table."""
    if weight.scales is not None:
        (axis,) = [at for at, size in enumerate(weight.scales.shape) if size > 1] or [0]
        scale = _scale(weight.scales.reshape(-1), dtype, name)
        return mb.constexpr_affine_dequantize(
            quantized_data=weight.codes,
            zero_point=np.zeros(scale.shape, np.int8),
            scale=scale,
            axis=np.int32(axis),
            name=name,
            before_op=before,
        )
    assert weight.tables is not None
    return mb.constexpr_lut_to_dense(
        indices=packed(weight.codes, weight.bits),
        lut=weight.tables.reshape(-1).astype(dtype),
        shape=np.array(weight.codes.shape, np.uint32),
        name=name,
        before_op=before,
    )


def _blockwise(weight: StoredWeight, dtype: Any, name: str, before: Any) -> Any:
    """Of iOS 18: a scale or a table for each block."""
    if weight.scales is not None:
        codes = weight.codes.astype(types.nptype_from_builtin(types.string_to_builtin(f"int{weight.bits}")))
        scale = _scale(weight.scales, dtype, name)
        return mb.constexpr_blockwise_shift_scale(data=codes, scale=scale, name=name, before_op=before)
    assert weight.tables is not None
    codes = weight.codes.astype(types.nptype_from_builtin(types.string_to_builtin(f"uint{weight.bits}")))
    tables = weight.tables[..., None].astype(dtype)
    return mb.constexpr_lut_to_dense(indices=codes, lut=tables, name=name, before_op=before)


def packed(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """`codes`, each of `bits` bits, one after the other in bytes, the lowest bit first (MIL specification)."""
    flat = codes.reshape(-1, 1).astype(np.uint8)
    return np.packbits((flat >> np.arange(bits, dtype=np.uint8)) & 1, bitorder="little")


def unpacked(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """What `packed` packed."""
    flat = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    return np.asarray((flat << np.arange(bits, dtype=np.uint8)).sum(1), np.uint8)


def count_compressed(
    program: Any, quantized: Mapping[str, OpPlan], placed: Mapping[str, Placed], what: str
) -> dict[str, str]:
    """Read every planned op in the saved `program` (PyMIL): `int8_ops` and `compressed_weights`.

    EdgegenError naming the op that is not there, whose numbers are not the plan's, or whose arithmetic is float.
    """
    found = {
        output.name: operation
        for function in program.functions.values()
        for operation in function.operations
        for output in operation.outputs
    }
    int8 = weights = 0
    for name, op in quantized.items():
        if op.precision not in COMPRESSED:
            continue
        place = placed.get(name)
        operation = None if place is None else found.get(place.output)
        if place is None or operation is None:
            raise EdgegenError(f"{what} has no operation for `{name}`, which is planned as {op.precision}")
        if place.weight is not None:
            _check_weight(operation.inputs[place.parameter], place.weight, name, op, what)
            weights += 1
        if op.precision == "w8a8":
            _check_int8(operation, place.parameter, name, what)
            int8 += 1
    return {"int8_ops": str(int8), "compressed_weights": str(weights)}


def _check_weight(value: Any, weight: StoredWeight, name: str, op: OpPlan, what: str) -> None:
    source = value.op
    kind = "const" if source is None else source.op_type
    if not kind.startswith("constexpr_"):
        raise EdgegenError(f"{what} holds the weight of `{name}` as a {kind}, it is planned as {op.precision}")
    dtype = types.nptype_from_builtin(value.dtype)
    if kind == "constexpr_lut_to_dense":
        codes, numbers = source.indices.val, source.lut.val
        if "shape" in source.inputs:
            codes = unpacked(codes, weight.bits, weight.codes.size)
        expected = weight.tables
    else:
        stored = "quantized_data" if kind == "constexpr_affine_dequantize" else "data"
        codes, numbers, expected = source.inputs[stored].val, source.scale.val, weight.scales
    same = (
        expected is not None
        and np.array_equal(codes.reshape(-1).astype(np.int16), weight.codes.reshape(-1).astype(np.int16))
        and np.array_equal(numbers.reshape(-1), expected.reshape(-1).astype(dtype))
    )
    if not same:
        raise EdgegenError(f"the weight of `{name}` in {what} does not have the plan's numbers")


def _check_int8(operation: Any, parameter: str, name: str, what: str) -> None:
    operands = [key for key in ("x", "y") if key in operation.inputs and key != parameter]
    for key in operands:
        source = operation.inputs[key].op
        if source is None or source.op_type != "dequantize":
            kind = "an input" if source is None else f"a {source.op_type}"
            raise EdgegenError(
                f"`{name}` is planned as w8a8: float compute between quantize and dequantize in {what}: it reads {kind}"
            )
    readers = _readers(operation)
    if readers == {"relu"}:  # computed along with it
        readers = _readers(operation.outputs[0].child_ops[0])
    if readers != {"quantize"}:
        raise EdgegenError(
            f"`{name}` is planned as w8a8: float compute between quantize and dequantize in {what}: "
            f"it is read by {', '.join(sorted(readers)) or 'the caller'}"
        )


def _readers(operation: Any) -> set[str]:
    return {child.op_type for child in operation.outputs[0].child_ops}
