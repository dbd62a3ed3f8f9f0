"""Values that a program holds: immediate ones, ones in weight files, and ones that follow from those."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mlprogram.blob import unpack
from mlprogram.errors import ProgramError
from mlprogram.package import Package
from mlprogram.tensor_type import ElementType, TensorType, read_type

# Field of a `TensorValue` by element type; packed bytes for all others (coremltools `_tensor_field_by_type`).
_FIELDS = {
    "fp32": ("floats",),
    "fp64": ("doubles",),
    "bool": ("bools",),
    "int32": ("ints",),
    "int64": ("longInts",),
    "int16": ("ints", "bytes"),
    "uint16": ("ints", "bytes"),
}


class Constant(Protocol):
    """A value that is known before the program runs."""

    type: TensorType
    fresh: bool
    """Whether `tensor()` computes it anew each time."""

    def tensor(self) -> Tensor: ...


class Stored:
    """A value that lies in the program or in a weight file."""

    fresh = False

    def __init__(self, type: TensorType, load: Callable[[], Tensor]) -> None:
        self.type = type
        self._load = load

    def tensor(self) -> Tensor:
        return self._load()


def read_value(message: Any, package: Package, what: str) -> Constant | str:
    """The constant in a `Value` message. Bounds and sizes are checked now, weight files read when used."""
    type = read_type(message.type, what)
    kind = message.WhichOneof("value")
    if type is None:
        texts: Sequence[str] = message.immediateValue.tensor.strings.values if kind == "immediateValue" else []
        if len(texts) != 1:
            raise ProgramError(f"{what} has {len(texts)} strings, expected one")
        return str(texts[0])
    if None in type.shape:
        raise ProgramError(f"{what} is a constant of type {type}, whose shape is not fixed")
    shape = tuple(one for one in type.shape if one is not None)
    count = math.prod(shape)
    element = type.element
    if kind == "blobFileValue":
        if element.blob_code is None:
            raise ProgramError(f"{what} of type {type} lies in a weight file, which holds no {element.name}")
        blob = package.blob(message.blobFileValue.fileName)
        start = blob.find(message.blobFileValue.offset, element, count, what)
        return Stored(type, lambda: blob.read(start, element, count).view(shape))
    if kind != "immediateValue" or message.immediateValue.WhichOneof("value") != "tensor":
        raise ProgramError(f"{what} has no value")
    tensor = _immediate(message.immediateValue.tensor, element, count, f"{what} of type {type}").view(shape)
    return Stored(type, lambda: tensor)


def _immediate(value: Any, element: ElementType, count: int, what: str) -> Tensor:
    field = value.WhichOneof("value")
    if count and field not in _FIELDS.get(element.name, ("bytes",)):
        raise ProgramError(f"{what} holds {field or 'nothing'}")
    if not count:
        return torch.empty(0, dtype=element.storage)
    if field == "bytes":
        data = value.bytes.values
        if len(data) != (count * element.bits + 7) // 8:
            raise ProgramError(f"{what} holds {len(data)} bytes")
        if element.bits < 8:
            return unpack(np.frombuffer(data, np.uint8), element, count)
        array = np.frombuffer(data, element.numpy)
    else:
        array = np.array(getattr(value, field).values)
        if len(array) != count:
            raise ProgramError(f"{what} holds {len(array)} values")
        info = np.iinfo(element.numpy) if element.numpy.kind in "iu" else None
        if info is not None and (array.min() < info.min or array.max() > info.max):
            raise ProgramError(f"{what} holds values outside of {element.name}")
    if element.storage.itemsize != element.numpy.itemsize:
        array = array.astype(np.int64)
    return torch.from_numpy(array.copy()).to(element.storage)
