"""An ML Program that is read from a saved package and executed with torch.

Specification: `MIL.proto` and `Model.proto` of the Core ML model format; operations as in `mlprogram.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import mlprogram.ops  # noqa: F401  (fills the table of operations)
from mlprogram.constant import Constant, read_value
from mlprogram.errors import ProgramError
from mlprogram.kernel import KERNELS, Accumulate, Kernel
from mlprogram.package import Package
from mlprogram.tensor_type import FP16, TensorType, read_type

Array = NDArray[np.generic]
_CONSTANT = "const"
_CONSTANT_EXPRESSION = "constexpr_"
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


Watch = Callable[[Operation, tuple[Array, ...]], None]


@dataclass(frozen=True)
class _Step:
    """An operation that is ready to run. A source is a known value, or the name of one that is computed."""

    operation: Operation
    kernel: Kernel
    fixed: Mapping[str, Any]
    """Parameters that are Python values, read when the program was opened."""
    sources: Mapping[str, tuple[Constant | str, ...]]
    """All other parameters."""
    last: tuple[str, ...]
    """Computed values that nothing reads after this."""


class Program:
    """One function of an ML Program, as `Program.open` gives it.

    `accumulate` says how sums of fp16 operations (products, convolutions, reductions) are kept: "fp32" rounds once, at
    the end; "fp16" rounds partial sums too (`mlprogram.sums`), to see what depends on it.
    """

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    operations: tuple[Operation, ...]
    """In their order, constants left out."""

    def __init__(self, package: Package, function: str | None, accumulate: Accumulate) -> None:
        self.accumulate: Accumulate = accumulate
        self.name = package.name
        self._package = package
        message = _function(package, function)
        block = _block(message, package.name)
        self._types: dict[str, TensorType] = {}
        self._constants: dict[str, Constant | str] = {}
        self.inputs = self._read_inputs(message)
        steps = [step for one in block.operations if (step := self._read(one)) is not None]
        self._returned = self._read_outputs(block)
        self.outputs = tuple(_feature(name, self._types[name]) for name in self._returned)
        self._steps = _with_last_uses(steps, self._returned)
        self.operations = tuple(one.operation for one in self._steps)
        self._check_description(function)
        # Decompressed and widened weights are kept until they take twice what the weight files do: for fp16 weights
        # that is all of them. What comes first is kept, because weights are needed in the same order every time.
        self._kept: dict[tuple[int, bool], Tensor] = {}
        self._room = 2 * package.weight_bytes

    @classmethod
    def open(cls, package: str | Path, *, function: str | None = None, accumulate: Accumulate = "fp32") -> Program:
        """The program in the `.mlpackage` folder `package`; `function` where it has several.

        Everything that can be wrong before a value is there is found now: the package may come from anywhere.
        ProgramError for what is no package with an ML Program, is cut off, points outside of itself, contradicts itself
        or has an operation or parameter that is not known.
        """
        if accumulate not in ("fp32", "fp16"):
            raise ProgramError(f"accumulate is `{accumulate}`, known are fp32 and fp16")
        return cls(Package(Path(package)), function, accumulate)

    def __call__(self, inputs: Mapping[str, Array], watch: Watch | None = None) -> dict[str, Array]:
        """Outputs by name. `watch` sees each operation with its values once they are computed.

        ProgramError for inputs that are not those of the program, and for what no value is defined for (an index
        outside, a division of integers by zero); the message names the operation.
        """
        with torch.inference_mode():
            values = self._given(inputs)
            for step in self._steps:
                results = self._run(step, values)
                for (name, _), result in zip(step.operation.outputs, results, strict=True):
                    values[name] = result
                if watch is not None:
                    pairs = zip(step.operation.outputs, results, strict=True)
                    watch(step.operation, tuple(_array(value, type) for (_, type), value in pairs))
                for name in step.last:
                    del values[name]
            return {name: _array(self._output(name, values), self._types[name]) for name in self._returned}

    def _given(self, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        names = {one.name for one in self.inputs}
        if set(inputs) != names:
            raise ProgramError(f"`{self.name}` takes {sorted(names)}, got {sorted(inputs)}")
        values = {}
        for one in self.inputs:
            array = np.asarray(inputs[one.name])
            type = self._types[one.name]
            if array.dtype != one.dtype or not type.admits(array.shape):
                raise ProgramError(f"input `{one.name}` is {array.dtype}{list(array.shape)}, expected {type}")
            values[one.name] = torch.from_numpy(np.array(array, order="C")).to(type.element.storage)
        return values

    def _derive(self, step: _Step, at: int) -> Tensor:
        return self._run(step, {})[at]

    def _output(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        known = self._constants.get(name)
        if known is None:
            return values[name]
        assert not isinstance(known, str)
        return known.tensor()

    def _run(self, step: _Step, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        operation, kernel = step.operation, step.kernel
        try:
            arguments = dict(step.fixed)
            for name, sources in step.sources.items():
                arguments[name] = self._argument(step, name, sources, values)
            if kernel.accumulates:
                half = operation.outputs[0][1].element is FP16
                arguments["accumulate"] = self.accumulate if half else "fp32"
            found = kernel.function(**arguments)
            results = found if isinstance(found, tuple) else (found,)
            return _checked(operation, results, kernel.arithmetic)
        except ProgramError as error:
            raise ProgramError(f"operation {operation} of `{self.name}`: {error}") from error
        except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            # What torch makes of arguments that do not go together, on one line.
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ProgramError(f"operation {operation} of `{self.name}` cannot be computed: {reason}") from error

    def _argument(
        self, step: _Step, name: str, sources: Sequence[Constant | str], values: Mapping[str, Tensor]
    ) -> Tensor | tuple[Tensor, ...] | Any:
        parameter = step.kernel.parameters[name]
        wide = step.kernel.arithmetic
        tensors = [self._source(one, values, wide) for one in sources]
        if parameter.kind == "tensor":
            return tensors[0]
        if parameter.kind == "tensors":
            return tuple(tensors)
        return parameter.read(tensors, None, f"parameter `{name}`")

    def _source(self, source: Constant | str, values: Mapping[str, Tensor], wide: bool) -> Tensor:
        if isinstance(source, str):
            value = values[source]
            return value.float() if wide and value.dtype == torch.float16 else value
        widened = wide and source.type.element is FP16
        if not (widened or source.fresh):
            return source.tensor()
        key = (id(source), widened)
        kept = self._kept.get(key)
        if kept is None:
            kept = source.tensor()
            kept = kept.float() if widened else kept
            size = kept.numel() * kept.element_size()
            if size <= self._room:
                self._room -= size
                self._kept[key] = kept
        return kept

    # Reading.

    def _read_inputs(self, message: Any) -> tuple[Feature, ...]:
        features = []
        for one in message.inputs:
            type = read_type(one.type, f"input `{one.name}`")
            if type is None:
                raise ProgramError(f"input `{one.name}` is a string, which is not supported")
            self._define(one.name, type)
            features.append(_feature(one.name, type))
        return tuple(features)

    def _read_outputs(self, block: Any) -> tuple[str, ...]:
        names = tuple(block.outputs)
        for name in names:
            if name not in self._types:
                raise ProgramError(f"output `{name}` of `{self.name}` is not computed")
        if not names or len(set(names)) != len(names):
            raise ProgramError(f"`{self.name}` returns {list(names)}")
        return names

    def _read(self, message: Any) -> _Step | None:
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
            raise ProgramError(f"{what} of `{self.name}` is not known to this evaluator")
        typed = []
        for output, type in outputs:
            if type is None:
                raise ProgramError(f"{what} computes a string")
            typed.append((output, type))
        if not typed:
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
        step = self._bind(operation, kernel, given, texts, what)
        if kind.startswith(_CONSTANT_EXPRESSION):
            self._define_derived(step)
            return None
        for output, type in typed:
            self._define(output, type)
        return step

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
            known = self._constants.get(binding)
            if known is None and binding not in self._types:
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
    ) -> _Step:
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
        return _Step(operation, kernel, fixed, sources, ())

    def _type(self, source: Constant | str) -> TensorType:
        return self._types[source] if isinstance(source, str) else source.type

    def _define(self, name: str, type: TensorType | None) -> None:
        if name in self._types or name in self._constants:
            raise ProgramError(f"value `{name}` of `{self.name}` is defined twice")
        if type is not None:
            self._types[name] = type

    def _define_constant(self, name: str, type: TensorType | None, value: Constant | str) -> None:
        said = None if isinstance(value, str) else value.type
        if said != type:
            raise ProgramError(
                f"constant `{name}` of `{self.name}` is {said or 'a string'}, declared {type or 'a string'}"
            )
        self._define(name, type)
        self._constants[name] = value

    def _define_derived(self, step: _Step) -> None:
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
        inputs, outputs = description.input, description.output
        if description.functions:
            name = function or description.defaultFunctionName
            inputs, outputs = next(
                ((one.input, one.output) for one in description.functions if one.name == name), ([], [])
            )
        for kind, said, found in (("inputs", inputs, self.inputs), ("outputs", outputs, self.outputs)):
            if sorted(one.name for one in said) != sorted(one.name for one in found):
                raise ProgramError(f"`{self.name}` describes other {kind} than its program has")
            for one in said:
                self._check_feature(one)

    def _check_feature(self, feature: Any) -> None:
        kind = feature.type.WhichOneof("Type")
        if kind != "multiArrayType":
            raise ProgramError(f"`{feature.name}` of `{self.name}` is a {kind}, not an array, which is not supported")
        array = feature.type.multiArrayType
        type = self._types[feature.name]
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


def _array(value: Tensor, type: TensorType) -> Array:
    """A copy as numpy has it: values share memory with each other and with the weight file."""
    return np.array(value.numpy(), dtype=type.element.numpy, order="C")


def _checked(operation: Operation, results: tuple[Tensor, ...], rounds: bool) -> tuple[Tensor, ...]:
    """Results in the types that the program declares: fp32 is rounded to fp16, everything else must be so already."""
    if len(results) != len(operation.outputs):
        raise ProgramError(f"{len(results)} values for {len(operation.outputs)} outputs")
    found = []
    for (name, type), result in zip(operation.outputs, results, strict=True):
        if rounds and result.dtype == torch.float32 and type.element is FP16:
            result = result.half()
        if result.dtype != type.element.storage or not type.admits(result.shape):
            raise ProgramError(f"`{name}` is {result.dtype}{list(result.shape)}, declared {type}")
        found.append(result)
    return tuple(found)


def _with_last_uses(steps: Sequence[_Step], returned: Sequence[str]) -> tuple[_Step, ...]:
    """The steps with the values that can be forgotten after each."""
    wanted = set(returned)
    ready = []
    for step in reversed(steps):
        read = {one for sources in step.sources.values() for one in sources if isinstance(one, str)}
        mentioned = read | {name for name, _ in step.operation.outputs}
        ready.append(replace(step, last=tuple(sorted(mentioned - wanted))))
        wanted |= mentioned
    return tuple(reversed(ready))
