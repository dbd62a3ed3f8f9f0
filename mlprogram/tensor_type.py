"""Element types of ML Programs (`MIL.proto`, `DataType`) and the types of values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlprogram.errors import ProgramError

# No value of a program this evaluator is for comes near; a declared size beyond it is a broken or hostile file.
MAX_BYTES = 4 << 30


@dataclass(frozen=True)
class ElementType:
    """One element type: `storage` is the torch type that holds it, one element each, however it is packed in a file.

    Unsigned types wider than 8 bits are held in the next wider signed type, which torch computes with.
    """

    name: str
    code: int
    """`DataType` of MIL.proto."""
    bits: int
    storage: torch.dtype
    numpy: np.dtype[Any]
    """What arrays of this type are for a caller, and how whole-byte elements lie in a file (little endian)."""
    blob_code: int | None = None
    """Type code of a weight file's entry, None where there is none."""

    @property
    def floating(self) -> bool:
        return self.storage.is_floating_point

    @property
    def signed(self) -> bool:
        return not self.name.startswith("uint")


def _element(name: str, code: int, bits: int, storage: torch.dtype, numpy: str, blob: int | None = None) -> ElementType:
    return ElementType(name, code, bits, storage, np.dtype(numpy), blob)


FP16 = _element("fp16", 10, 16, torch.float16, "<f2", 1)
FP32 = _element("fp32", 11, 32, torch.float32, "<f4", 2)
BOOL = _element("bool", 1, 8, torch.bool, "?")
INT32 = _element("int32", 23, 32, torch.int32, "<i4", 14)

ELEMENT_TYPES = (
    FP16,
    FP32,
    BOOL,
    INT32,
    _element("fp64", 12, 64, torch.float64, "<f8"),
    _element("int4", 25, 4, torch.int8, "i1", 8),
    _element("int8", 21, 8, torch.int8, "i1", 4),
    _element("int16", 22, 16, torch.int16, "<i2", 6),
    _element("int64", 24, 64, torch.int64, "<i8"),
    _element("uint1", 37, 1, torch.uint8, "u1", 9),
    _element("uint2", 36, 2, torch.uint8, "u1", 10),
    _element("uint3", 39, 3, torch.uint8, "u1", 12),
    _element("uint4", 35, 4, torch.uint8, "u1", 11),
    _element("uint6", 38, 6, torch.uint8, "u1", 13),
    _element("uint8", 31, 8, torch.uint8, "u1", 3),
    _element("uint16", 32, 16, torch.int32, "<u2", 7),
    _element("uint32", 33, 32, torch.int64, "<u4", 15),
)
BY_NAME = {one.name: one for one in ELEMENT_TYPES}
_BY_CODE = {one.code: one for one in ELEMENT_TYPES}
STRING_CODE = 2


@dataclass(frozen=True)
class TensorType:
    """Element type and shape; a dimension that the program leaves open is None."""

    element: ElementType
    shape: tuple[int | None, ...]

    def admits(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.shape) and all(
            want is None or want == have for want, have in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.element.name}[{', '.join('?' if one is None else str(one) for one in self.shape)}]"


def read_type(message: Any, what: str) -> TensorType | None:
    """The type in a `ValueType` message, None for a string. ProgramError for types that no tensor has."""
    kind = message.WhichOneof("type")
    if kind != "tensorType":
        raise ProgramError(f"{what} is a {kind or 'value without a type'}, which is not supported")
    tensor = message.tensorType
    if tensor.rank != len(tensor.dimensions):
        raise ProgramError(f"{what} has rank {tensor.rank} and {len(tensor.dimensions)} dimensions")
    shape: list[int | None] = []
    for dimension in tensor.dimensions:
        kind = dimension.WhichOneof("dimension")
        if kind == "unknown" and dimension.unknown.variadic:
            raise ProgramError(f"{what} has a rank that is not fixed, which is not supported")
        if kind == "constant" and dimension.constant.size > MAX_BYTES:
            raise ProgramError(f"{what} has a dimension of {dimension.constant.size}")
        shape.append(dimension.constant.size if kind == "constant" else None)
    if tensor.dataType == STRING_CODE:
        if shape:
            raise ProgramError(f"{what} is a tensor of strings, which is not supported")
        return None
    element = _BY_CODE.get(tensor.dataType)
    if element is None:
        raise ProgramError(f"{what} has element type {tensor.dataType}, which is not supported")
    size = math.prod(one for one in shape if one is not None) * element.storage.itemsize
    if size > MAX_BYTES:
        raise ProgramError(f"{what} would take {size / (1 << 30):.0f} GiB")
    return TensorType(element, tuple(shape))
