"""The outline of a saved ML Program: its functions, operations, types and constants, read without executing anything.

`mlprogram.Program` refuses what it cannot compute. Here every operation is listed, known or not, because whoever reads
a package wants to hear of those as well. Format: `MIL.proto` and `Model.proto` of the Core ML model format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgegen.errors import EdgegenError
from edgegen.lower.mlpackage import split_function
from mlprogram.constant import read_value
from mlprogram.errors import ProgramError
from mlprogram.package import Package
from mlprogram.tensor_type import TensorType, read_type

_CONSTANT = "const"
_COMPRESSED = "constexpr_"


@dataclass(frozen=True)
class Value:
    """A value of a function. `type` is None for what is no tensor; `message` is there for constants alone."""

    name: str
    type: TensorType | None
    message: Any = None
    compressed: bool = False
    """Whether a `constexpr_*` operation makes it."""

    @property
    def constant(self) -> bool:
        return self.message is not None or self.compressed

    @property
    def elements(self) -> int:
        """0 where the shape is open, or there is none."""
        if self.type is None or None in self.type.shape:
            return 0
        return math.prod(one for one in self.type.shape if one is not None)

    @property
    def stored_bits(self) -> int:
        """What a constant takes in its file."""
        return self.elements * self.type.element.bits if self.type is not None else 0


@dataclass(frozen=True)
class MilOperation:
    """One operation; `inputs` by parameter. `name` is what coremltools called it, else its first output."""

    function: str
    type: str
    name: str
    inputs: Mapping[str, tuple[Value, ...]]
    outputs: tuple[Value, ...]

    @property
    def constant(self) -> bool:
        return self.type == _CONSTANT

    @property
    def decompresses(self) -> bool:
        return self.type.startswith(_COMPRESSED)

    @property
    def at_run_time(self) -> bool:
        return not self.constant and not self.decompresses


@dataclass(frozen=True)
class MilFunction:
    """One function: what it takes, keeps between calls, computes and returns, blocks of control flow included."""

    name: str
    inputs: tuple[Value, ...]
    states: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operations: tuple[MilOperation, ...]


@dataclass(frozen=True)
class Outline:
    """A package that was opened: `spec` is its `Model` message."""

    path: Path
    package: Package
    spec: Any
    functions: tuple[MilFunction, ...]

    def array(self, value: Value) -> np.ndarray[Any, Any] | None:
        """The numbers of a constant, None for a string and for what cannot be read as one tensor."""
        try:
            found = read_value(value.message, self.package, f"constant `{value.name}`")
            return None if isinstance(found, str) else np.asarray(found.tensor().numpy())
        except ProgramError:
            return None

    def weight_files(self) -> dict[str, int]:
        """Bytes of every file below the model's folder but the model itself."""
        folder = self.package.model_folder
        files = sorted(one for one in folder.rglob("*") if one.is_file() and not one.is_symlink())
        return {
            one.relative_to(folder).as_posix(): one.stat().st_size for one in files if one.suffix not in {".mlmodel"}
        }


def read_outline(path: Path) -> Outline:
    """Open the `.mlpackage` folder `path`, or one function of it (`mlpackage.function_path`).

    EdgegenError for what is no ML Program, or leaves its own folder, and for a function that is not there.
    """
    folder, wanted = split_function(path)
    try:
        package = Package(folder)
        messages = dict(package.spec.mlProgram.functions.items())
        if wanted is not None and wanted not in messages:
            raise ProgramError(f"`{folder.name}` has no function `{wanted}`, it has {sorted(messages)}")
        names = sorted(messages) if wanted is None else [wanted]
        functions = tuple(_function(name, messages[name]) for name in names)
    except ProgramError as error:
        raise EdgegenError(str(error), hint=error.hint) from error
    return Outline(folder, package, package.spec, functions)


def _function(name: str, message: Any) -> MilFunction:
    known: dict[str, Value] = {}
    inputs: list[Value] = []
    states: list[Value] = []
    for one in message.inputs:
        state = one.type.WhichOneof("type") == "stateType"
        value = Value(one.name, _type(one.type.stateType.wrappedType if state else one.type))
        (states if state else inputs).append(value)
        known[one.name] = value
    block = message.block_specializations.get(message.opset)
    if block is None:
        raise ProgramError(f"function `{name}` has no block for its operation set `{message.opset}`")
    operations = tuple(_operations(name, block, known, 0))
    outputs = tuple(known.get(one) or Value(one, None) for one in block.outputs)
    return MilFunction(name, tuple(inputs), tuple(states), outputs, operations)


def _operations(function: str, block: Any, known: dict[str, Value], depth: int) -> Iterator[MilOperation]:
    if depth > 32:
        raise ProgramError(f"function `{function}` has blocks within blocks without end")
    for message in block.operations:
        for inner in message.blocks:
            for one in inner.inputs:
                known[one.name] = Value(one.name, _type(one.type))
            yield from _operations(function, inner, known, depth + 1)
        inputs = {name: tuple(_read(one, known) for one in bound.arguments) for name, bound in message.inputs.items()}
        attributes = dict(message.attributes.items())
        label = attributes.pop("name", None)
        constant = attributes.get("val") if message.type == _CONSTANT else None
        for name, value in attributes.items():
            inputs.setdefault(name, (Value(name, _type(value.type), value),))
        compressed = message.type.startswith(_COMPRESSED)
        outputs = tuple(Value(one.name, _type(one.type), constant, compressed) for one in message.outputs)
        known.update((one.name, one) for one in outputs)
        texts: Sequence[str] = label.immediateValue.tensor.strings.values if label is not None else ()
        name = str(texts[0]) if len(texts) == 1 else next((one.name for one in outputs), "?")
        yield MilOperation(function, message.type, name, inputs, outputs)


def _read(binding: Any, known: Mapping[str, Value]) -> Value:
    if binding.WhichOneof("binding") == "value":
        return Value("", _type(binding.value.type), binding.value)
    return known.get(binding.name) or Value(binding.name, None)


def _type(message: Any) -> TensorType | None:
    try:
        return read_type(message, "a value")
    except ProgramError:
        return None
