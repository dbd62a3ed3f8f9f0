"""Reading one function of an ML Program: its signature, its constants, and its operations as steps that can run.

Everything that can be wrong with a program before a value is there is found here. Specification: `MIL.proto` and
`Model.proto` of the Core ML model format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

import mlprogram.ops  # noqa: F401  (fills the table of operations)
from mlprogram.constant import Constant, read_value
from mlprogram.errors import ProgramError
from mlprogram.kernel import KERNELS, Kernel
from mlprogram.package import Package
from mlprogram.tensor_type import TensorType, read_type

_CONSTANT = "const"
_CONSTANT_EXPRESSION = "constexpr_"
_READS_STATE = "read_state"
WRITES_STATE = "write_state"
# Of `ArrayFeatureType.ArrayDataType`, by the element types that the program may declare for them.
_FEATURES = {"FLOAT32": "fp32", "FLOAT16": "fp16", "INT32": "int32", "INT8": "int8", "DOUBLE": "fp64"}


@dataclass(frozen=True)
class Feature:
    """An input or output. A dimension that the program leaves open is None."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Operation:
    """One operation as the program has it. `inputs` are names of values by parameter; literal values have none."""

    type: str
    name: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: tuple[tuple[str, TensorType], ...]

    def __str__(self) -> str:
        return f"`{self.name}` ({self.type})"


@dataclass(frozen=True)
class Step:
    """An operation that is ready to run. A source is a known value, or the name of one that is computed."""

    operation: Operation
    kernel: Kernel
    fixed: Mapping[str, Any]
    """Parameters that are Python values, read when the program was opened."""
    sources: Mapping[str, tuple[Constant | str, ...]]
    """All other parameters."""
    last: tuple[str, ...]
    """Computed values that nothing reads after this."""


Derive = Callable[[Step, int], Tensor]


class Reader:
    """One function as it was read: signature, types, constants, and the steps in their order.

    `derive` computes an output of a step of constants, when it is needed.
    """

    def __init__(self, package: Package, function: str | None, derive: Derive) -> None:
        self.name = package.name
        self._package = package
        self._derive = derive
        message = _function(package, function)
        block = _block(message, package.name)
        self.types: dict[str, TensorType] = {}
        self.constants: dict[str, Constant | str] = {}
        self._state_names = {one.name for one in message.inputs if one.type.WhichOneof("type") == "stateType"}
        features = self._read_inputs(message)
        self.inputs = tuple(one for one in features if one.name not in self._state_names)
        self.states = tuple(one for one in features if one.name in self._state_names)
        steps = [step for one in block.operations if (step := self._read(one)) is not None]
        self.returned = self._read_outputs(block)
        self.outputs = tuple(_feature(name, self.types[name]) for name in self.returned)
        self.steps = _with_last_uses(steps, (*self.returned, *self._state_names))
        self._check_description(function)

    def _read_inputs(self, message: Any) -> tuple[Feature, ...]:
        features = []
        for one in message.inputs:
            kept = one.name in self._state_names
            type = read_type(one.type.stateType.wrappedType if kept else one.type, f"input `{one.name}`")
            if type is None:
                raise ProgramError(f"input `{one.name}` is a string, which is not supported")
            if kept and None in type.shape:
                raise ProgramError(f"state `{one.name}` is {type}, whose shape is not fixed")
            self._define(one.name, type)
            features.append(_feature(one.name, type))
        return tuple(features)

    def _read_outputs(self, block: Any) -> tuple[str, ...]:
        names = tuple(block.outputs)
        for name in names:
            if name not in self.types or name in self._state_names:
                raise ProgramError(f"output `{name}` of `{self.name}` is not computed")
        if not names or len(set(names)) != len(names):
            raise ProgramError(f"`{self.name}` returns {list(names)}")
        return names

    def _read(self, message: Any) -> Step | None:
        """A step, or None for what is known already: constants and what follows from them."""
        kind = message.type
        attributes = dict(message.attributes.items())
        label = attributes.pop("name", None)
        outputs = [(one.name, read_type(one.type, f"value `{one.name}`")) for one in message.outputs]
        name = _label(label) or (outputs[0][0] if outputs else "?")
        what = f"operation `{name}` ({kind})"
        if message.blocks:
            raise ProgramError(f"{what} has blocks: control flow is not supported")
        if kind == _CONSTANT:
            if set(attributes) != {"val"} or message.inputs or len(outputs) != 1:
                raise ProgramError(f"{what} is not a constant")
            self._define_constant(outputs[0][0], outputs[0][1], read_value(attributes["val"], self._package, what))
            return None
        kernel = KERNELS.get(kind)
        if kernel is None:
            raise ProgramError(
                f"{what} of `{self.name}` is not known to this evaluator",
                "run the package with Core ML itself, or rewrite the operation before it is converted",
            )
        typed = []
        for output, type in outputs:
            if type is None:
                raise ProgramError(f"{what} computes a string")
            typed.append((output, type))
        if bool(typed) == (kind == WRITES_STATE):
            raise ProgramError(f"{what} has {len(typed)} outputs")
        if not typed and kind != WRITES_STATE:
            raise ProgramError(f"{what} has no output")
        given: dict[str, list[Constant | str]] = {}
        names: dict[str, tuple[str, ...]] = {}
        texts: dict[str, str] = {}
        for parameter, bindings in self._bindings(message, attributes):
            if parameter in given or parameter in texts:
                raise ProgramError(f"{what} has parameter `{parameter}` twice")
            names[parameter] = tuple(one for one in bindings if isinstance(one, str))
            found = [self._resolve(one, f"parameter `{parameter}` of {what}") for one in bindings]
            if len(found) == 1 and isinstance(found[0], _Text):
                texts[parameter] = found[0].text
            elif any(isinstance(one, _Text) for one in found):
                raise ProgramError(f"parameter `{parameter}` of {what} has several strings")
            else:
                given[parameter] = [one for one in found if not isinstance(one, _Text)]
        operation = Operation(kind, name, names, tuple(typed))
        self._check_states(operation, what)
        step = self._bind(operation, kernel, given, texts, what)
        if kind.startswith(_CONSTANT_EXPRESSION):
            self._define_derived(step)
            return None
        for output, type in typed:
            self._define(output, type)
        return step

    def _check_states(self, operation: Operation, what: str) -> None:
        """That states are read and written by the operations for it, and by nothing else."""
        for parameter, names in operation.inputs.items():
            wanted = operation.type in (_READS_STATE, WRITES_STATE) and parameter == "input"
            for name in names:
                if (name in self._state_names) != wanted:
                    raise ProgramError(f"{what} reads `{name}`, which is {'no' if wanted else 'a'} state")
            if wanted and len(names) != 1:
                raise ProgramError(f"{what} reads no state")

    def _bindings(self, message: Any, attributes: Mapping[str, Any]) -> Iterable[tuple[str, list[_Literal | str]]]:
        for parameter, argument in message.inputs.items():
            bindings = argument.arguments
            yield (
                parameter,
                [str(one.name) if one.WhichOneof("binding") == "name" else _Literal(one.value) for one in bindings],
            )
        # Constant expressions before iOS 18 have attributes in place of inputs.
        for parameter, value in attributes.items():
            yield parameter, [_Literal(value)]

    def _resolve(self, binding: _Literal | str, what: str) -> Constant | str | _Text:
        """A known value, the name of a computed one, or a string."""
        known = read_value(binding.message, self._package, what) if isinstance(binding, _Literal) else None
        if isinstance(binding, str):
            known = self.constants.get(binding)
            if known is None and binding not in self.types:
                raise ProgramError(f"{what} reads `{binding}`, which is not computed before")
            if known is None:
                return binding
        assert known is not None
        return _Text(known) if isinstance(known, str) else known

    def _bind(
        self,
        operation: Operation,
        kernel: Kernel,
        given: Mapping[str, list[Constant | str]],
        texts: Mapping[str, str],
        what: str,
    ) -> Step:
        for name in (*given, *texts):
            if name not in kernel.parameters:
                raise ProgramError(f"{what} has a parameter `{name}` that is not known")
        fixed: dict[str, Any] = {}
        sources: dict[str, tuple[Constant | str, ...]] = {}
        for name, parameter in kernel.parameters.items():
            where = f"parameter `{name}` of {what}"
            if name in texts:
                fixed[name] = parameter.read([], texts[name], where)
            elif name not in given:
                if parameter.required:
                    raise ProgramError(f"{what} has no parameter `{name}`")
            else:
                bound = given[name]
                if not bound or (len(bound) > 1 and not parameter.vector):
                    raise ProgramError(f"{where} has {len(bound)} values")
                constants = [one for one in bound if not isinstance(one, str)]
                if parameter.kind in ("tensor", "tensors") or len(constants) != len(bound):
                    if parameter.kind == "str":
                        raise ProgramError(f"{where} is not a string")
                    sources[name] = tuple(bound)
                else:
                    fixed[name] = parameter.read([one.tensor() for one in constants], None, where)
        kinds = [self._type(one).element.name for name in kernel.alike for one in given.get(name, ())]
        if len(set(kinds)) > 1:
            raise ProgramError(f"{what} mixes {' and '.join(sorted(set(kinds)))}")
        return Step(operation, kernel, fixed, sources, ())

    def _type(self, source: Constant | str) -> TensorType:
        return self.types[source] if isinstance(source, str) else source.type

    def _define(self, name: str, type: TensorType | None) -> None:
        if name in self.types or name in self.constants:
            raise ProgramError(f"value `{name}` of `{self.name}` is defined twice")
        if type is not None:
            self.types[name] = type

    def _define_constant(self, name: str, type: TensorType | None, value: Constant | str) -> None:
        said = None if isinstance(value, str) else value.type
        if said != type:
            raise ProgramError(
                f"constant `{name}` of `{self.name}` is {said or 'a string'}, declared {type or 'a string'}"
            )
        self._define(name, type)
        self.constants[name] = value

    def _define_derived(self, step: Step) -> None:
        for sources in step.sources.values():
            for one in sources:
                if isinstance(one, str):
                    raise ProgramError(
                        f"operation {step.operation} of `{self.name}` reads `{one}`, which is no constant"
                    )
        for at, (name, type) in enumerate(step.operation.outputs):
            self._define_constant(name, type, _Derived(type, partial(self._derive, step, at)))

    def _check_description(self, function: str | None) -> None:
        """That the package's description of inputs and outputs is the program's own: callers go by the description."""
        description = self._package.spec.description
        if description.functions:
            name = function or description.defaultFunctionName
            description = next((one for one in description.functions if one.name == name), None)
            if description is None:
                raise ProgramError(f"`{self.name}` does not describe its function `{name}`")
        for kind, said, found in (
            ("inputs", description.input, self.inputs),
            ("outputs", description.output, self.outputs),
            ("states", description.state, self.states),
        ):
            if sorted(one.name for one in said) != sorted(one.name for one in found):
                raise ProgramError(f"`{self.name}` describes other {kind} than its program has")
            for one in said:
                self._check_feature(one)

    def _check_feature(self, feature: Any) -> None:
        kind = feature.type.WhichOneof("Type")
        wanted = "stateType" if feature.name in self._state_names else "multiArrayType"
        if kind != wanted:
            raise ProgramError(f"`{feature.name}` of `{self.name}` is a {kind}, expected {wanted}")
        array = feature.type.stateType.arrayType if kind == "stateType" else feature.type.multiArrayType
        type = self.types[feature.name]
        said = _FEATURES.get(array.ArrayDataType.Name(array.dataType)) if array.dataType else None
        fixed = None not in type.shape and array.WhichOneof("ShapeFlexibility") is None
        if said != type.element.name or (array.shape and fixed and tuple(array.shape) != type.shape):
            shape = list(array.shape)
            raise ProgramError(
                f"`{feature.name}` of `{self.name}` is described as {said}{shape}, the program says {type}"
            )


@dataclass(frozen=True)
class _Literal:
    """A `Value` that is written into the operation itself."""

    message: Any


@dataclass(frozen=True)
class _Text:
    text: str


class _Derived:
    """What an operation makes of constants, computed when it is needed."""

    fresh = True

    def __init__(self, type: TensorType, compute: Callable[[], Tensor]) -> None:
        self.type = type
        self._compute = compute

    def tensor(self) -> Tensor:
        return self._compute()


def _function(package: Package, name: str | None) -> Any:
    functions = package.spec.mlProgram.functions
    chosen = name or package.spec.description.defaultFunctionName or "main"
    if chosen not in functions:
        raise ProgramError(f"`{package.name}` has no function `{chosen}`, it has {sorted(functions)}")
    return functions[chosen]


def _block(function: Any, name: str) -> Any:
    block = function.block_specializations.get(function.opset)
    if block is None:
        raise ProgramError(f"`{name}` has no block for its operation set `{function.opset}`")
    if block.inputs:
        raise ProgramError(f"the block of a function of `{name}` has inputs of its own")
    return block


def _label(value: Any) -> str:
    texts: Sequence[str] = value.immediateValue.tensor.strings.values if value is not None else []
    return str(texts[0]) if len(texts) == 1 else ""


def _feature(name: str, type: TensorType) -> Feature:
    return Feature(name, type.shape, type.element.numpy)


def _with_last_uses(steps: Sequence[Step], returned: Sequence[str]) -> tuple[Step, ...]:
    """The steps with the values that can be forgotten after each."""
    wanted = set(returned)
    ready = []
    for step in reversed(steps):
        read = {one for sources in step.sources.values() for one in sources if isinstance(one, str)}
        mentioned = read | {name for name, _ in step.operation.outputs}
        ready.append(replace(step, last=tuple(sorted(mentioned - wanted))))
        wanted |= mentioned
    return tuple(reversed(ready))
