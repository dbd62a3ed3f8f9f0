"""Reading a saved Core AI asset: which of its products and convolutions have compressed weights, which are int8."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgegen.errors import EdgegenError
from edgegen.lower.mlir_bytecode import resources
from edgegen.lower.stored_weight import StoredWeight
from edgegen.precision.plan import COMPRESSED, OpPlan

_RESOURCE = re.compile(r"dense_resource<([^>]+)>")
_COMPUTE = ("conv1d", "conv2d", "conv3d", "conv_transpose", "batch_matmul", "matmul")
_EXPRESSIONS = ("coreai.blockwise_shift_scale", "coreai.lut_to_dense")
# What may lie between int8 values and a product, or between the product and what quantizes it: no arithmetic of its
# own but the bias and a relu, which units for int8 compute along.
_LAYOUT = frozenset({"transpose", "reshape", "pad", "expand_dims", "squeeze", "shrink_dims", "broadcast_in_dims"})
_AFTER = _LAYOUT | {"broadcasting_add", "add", "relu"}


@dataclass(frozen=True)
class Computed:
    """One product or convolution: type and shape of its weight's codes (None without), whether it is int8, and the
    codes' bytes as the file has them (empty where they are computed)."""

    codes: tuple[str, tuple[int, ...]] | None
    int8: bool
    held: bytes = b""


def count_compressed(
    module: Any, code: bytes, quantized: Mapping[str, OpPlan], stored: Mapping[str, StoredWeight], what: str
) -> dict[str, str]:
    """`int8_ops` and `compressed_weights` of a saved program: its MLIR `module`, and its bytes.

    EdgegenError naming the op whose codes are not in the file, are not read by a product, or are computed with as
    floats where int8 is planned. Ops go by their codes: another op of that shape does not stand for one.
    """
    there = Counter(computed(module, code))
    int8 = weights = 0
    for name, op in quantized.items():
        if op.precision not in COMPRESSED:
            continue
        weight = stored.get(name)
        if weight is not None and packed(weight) not in code and len(set(weight.codes.flat)) > 1:
            raise EdgegenError(f"the codes of the weight of `{name}`, planned as {op.precision}, are not in {what}")
        codes = None if weight is None else (_element(weight), tuple(weight.codes.shape))
        is_int8 = op.precision == "w8a8"
        own = [one for one in +there if one.codes == codes and (weight is None or _holds(one, weight))]
        wanted = next((one for one in own if one.int8 == is_int8), None)
        if wanted is None:
            as_float = is_int8 and own
            why = "float compute between quantize and dequantize" if as_float else "no product reads its codes"
            raise EdgegenError(f"`{name}` is planned as {op.precision}: {why} in {what}")
        there[wanted] -= 1
        int8 += is_int8
        weights += weight is not None
    return {"int8_ops": str(int8), "compressed_weights": str(weights)}


def saved_module(asset: Path) -> Any:
    """The MLIR module of a saved asset."""
    from coreai.authoring import AIModelAsset

    return AIModelAsset.load(asset).program._module._mlir_module  # coreai shows its operations nowhere else


def _holds(one: Computed, weight: StoredWeight) -> bool:
    """Whether its codes are those of `weight`; of a weight of one code alone, the file may hold that once."""
    return one.held in (packed(weight), weight.codes.tobytes()) or len(set(weight.codes.flat)) == 1


def computed(module: Any, code: bytes = b"") -> Iterator[Computed]:
    """Every product and convolution of the module; `code` is its file, for the bytes of weights."""
    blobs = resources(code) if code else {}
    for function in module.body.operations:
        for region in function.regions:
            for block in region.blocks:
                for operation in block.operations:
                    if _name(operation).startswith(_COMPUTE) or _name(operation) == "broadcasting_batch_matmul":
                        yield _computed(operation, blobs)


def _computed(operation: Any, blobs: Mapping[str, bytes]) -> Computed:
    sources = [_source(value) for value in list(operation.operands)[:2]]
    codes, int8, bytes_held = None, True, b""
    for source in sources:
        kind = "" if source is None else source.name
        if kind in _EXPRESSIONS:
            assert source is not None
            held = source.operands[0].type
            codes = (str(held.element_type), tuple(held.shape))
            bytes_held = _constant_bytes(source.operands[0].owner, blobs)
            int8 &= codes[0] == "si8" and kind == _EXPRESSIONS[0]
        else:
            int8 &= kind == "coreai.dequantize"
    return Computed(codes, int8 and _quantized_after(operation), bytes_held)


def _constant_bytes(constant: Any, blobs: Mapping[str, bytes]) -> bytes:
    """What a constant holds: in place, or in a resource of the file."""
    if getattr(constant, "name", "") != "coreai.constant":
        return b""
    value = constant.attributes["value"]
    resource = _RESOURCE.match(str(value))
    if resource is not None:
        return blobs.get(resource[1], b"")
    array = np.array(value)
    return b"" if array.dtype == object else array.tobytes()


def _source(value: Any) -> Any:
    """The operation that `value` comes from, shape changes left out; None for an argument."""
    while True:
        owner = value.owner
        if not hasattr(owner, "operands"):
            return None
        if _name(owner) not in _LAYOUT:
            return owner
        value = owner.operands[0]


def _quantized_after(operation: Any) -> bool:
    """Whether nothing but `quantize` reads what the operation computes, its bias added."""
    readers = [use.owner for use in operation.results[0].uses]
    if not readers:
        return False
    return all(
        one.name == "coreai.quantize" or (_name(one) in _AFTER and _constant_beside(one) and _quantized_after(one))
        for one in readers
    )


def _constant_beside(operation: Any) -> bool:
    """Of an addition, that one side is a constant; nothing of others."""
    if not _name(operation).endswith("add"):
        return True
    return any(getattr(value.owner, "name", "") == "coreai.constant" for value in operation.operands)


def _name(operation: Any) -> str:
    return str(operation.name).rpartition(".")[2]


def _element(weight: StoredWeight) -> str:
    return f"si{weight.bits}" if weight.scales is not None else f"ui{weight.bits}"


def packed(weight: StoredWeight) -> bytes:
    """The codes as an asset holds them."""
    from coreai_torch._compression._intx import pack_intx, pack_uintx

    codes = torch.from_numpy(weight.codes)
    if weight.bits < 8:
        codes = (pack_uintx if weight.scales is None else pack_intx)(codes, weight.bits)
    return codes.contiguous().numpy().tobytes()
