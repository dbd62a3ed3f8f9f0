"""An ML Program that is read from a saved package and executed with torch.

Specification: `MIL.proto` and `Model.proto` of the Core ML model format; operations as in `mlprogram.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlprogram.constant import Constant
from mlprogram.errors import ProgramError
from mlprogram.kernel import Accumulate, Arithmetic
from mlprogram.package import Package
from mlprogram.pieces import in_pieces
from mlprogram.reading import WRITES_STATE, Feature, Operation, Reader, Step
from mlprogram.tensor_type import FP16, TensorType

Array = NDArray[np.generic]
_CAST = "cast"
# What is computed of constants alone: its result is a weight, which no arithmetic changes.
_CONSTANT_EXPRESSION = "constexpr_"

Watch = Callable[[Operation, tuple[Array, ...]], None]


class State:
    """What a program keeps between calls, as `Program.make_state` gives it: zeros at first."""

    def __init__(self, types: Mapping[str, TensorType], values: dict[str, Tensor]) -> None:
        self._types = types
        self._values = values

    def read(self, name: str) -> Array:
        """A copy of what state `name` holds. ProgramError when there is none."""
        self._check(name)
        return _array(self._values[name], self._types[name])

    def write(self, name: str, value: Array) -> None:
        """Give state `name` another value, of its own type and shape. ProgramError when it is not."""
        self._check(name)
        type = self._types[name]
        if value.dtype != type.element.numpy or not type.admits(value.shape):
            raise ProgramError(f"state `{name}` is {type}, not {value.dtype}{list(value.shape)}")
        self._values[name] = torch.from_numpy(np.array(value, order="C")).to(self._values[name].dtype)

    def _check(self, name: str) -> None:
        if name not in self._values:
            raise ProgramError(f"there is no state `{name}`, but {sorted(self._values)}")


class Program:
    """One function of an ML Program, as `Program.open` gives it.

    `accumulate` says how sums of fp16 operations (products, convolutions, reductions) are kept: "fp32" rounds once, at
    the end; "fp16" rounds partial sums too (`mlprogram.sums`), to see what depends on it. `arithmetic` "fp32" computes
    every fp16 operation in fp32 and rounds nothing, casts to fp16 included: the difference is what fp16 costs. Weights
    stay the numbers that the file has.
    """

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...]
    """What is kept between calls; most programs have none."""
    operations: tuple[Operation, ...]
    """In their order, constants left out."""

    def __init__(
        self, package: Package, function: str | None, accumulate: Accumulate, arithmetic: Arithmetic = "declared"
    ) -> None:
        self.accumulate: Accumulate = accumulate
        self.arithmetic: Arithmetic = arithmetic
        self._wide = arithmetic == "fp32"
        self.name = package.name
        reader = Reader(package, function, self._derive)
        self.inputs, self.outputs, self.states = reader.inputs, reader.outputs, reader.states
        self.operations = tuple(one.operation for one in reader.steps)
        self._steps = reader.steps
        self._types = reader.types
        self._constants = reader.constants
        self._returned = reader.returned
        # Decompressed weights are kept until they take twice what the weight files do. What comes first is kept,
        # because weights are needed in the same order every time. Weights that lie in the file as they are stay there,
        # and are widened each time: that is quick, and keeping them would take three times the file.
        self._kept: dict[int, Tensor] = {}
        self._room = 2 * package.weight_bytes

    @classmethod
    def open(
        cls,
        package: str | Path,
        *,
        function: str | None = None,
        accumulate: Accumulate = "fp32",
        arithmetic: Arithmetic = "declared",
    ) -> Program:
        """The program in the `.mlpackage` folder `package`; `function` where it has several.

        Everything that can be wrong before a value is there is found now: the package may come from anywhere.
        ProgramError for what is no package with an ML Program, is cut off, points outside of itself, contradicts itself
        or has an operation or parameter that is not known.
        """
        if accumulate not in ("fp32", "fp16"):
            raise ProgramError(f"accumulate is `{accumulate}`, known are fp32 and fp16")
        if arithmetic not in ("declared", "fp32"):
            raise ProgramError(f"arithmetic is `{arithmetic}`, known are declared and fp32")
        return cls(Package(Path(package)), function, accumulate, arithmetic)

    def make_state(self) -> State:
        """Zeros for every state, to be given to each call that follows on the one before."""
        types = {one.name: self._types[one.name] for one in self.states}
        values = {}
        for name, type in types.items():
            shape = [size for size in type.shape if size is not None]
            values[name] = torch.zeros(shape, dtype=self._storage(type))
        return State(types, values)

    def __call__(
        self, inputs: Mapping[str, Array], watch: Watch | None = None, *, state: State | None = None
    ) -> dict[str, Array]:
        """Outputs by name. `watch` sees each operation with its values once they are computed: in the types that the
        program declares, or in fp32 where `arithmetic` makes them that. `state`, from `make_state`, is read and, when
        the call succeeds, changed.

        ProgramError for inputs that are not those of the program, a program with states that is given none, and for
        what no value is defined for (an index outside, a division of integers by zero); the message names the
        operation.
        """
        with torch.inference_mode():
            values = self._given(inputs) | self._states(state)
            for step in self._steps:
                results = self._run(step, values)
                if step.operation.type == WRITES_STATE:
                    (name,) = step.operation.inputs["input"]
                    (values[name],) = results
                else:
                    for (name, _), result in zip(step.operation.outputs, results, strict=True):
                        values[name] = result
                    if watch is not None:
                        pairs = zip(step.operation.outputs, results, strict=True)
                        watch(step.operation, tuple(self._seen(value, type) for (_, type), value in pairs))
                for name in step.last:
                    del values[name]
            outputs = {name: _array(self._output(name, values), self._types[name]) for name in self._returned}
            if state is not None:
                # A copy: what was written may be a view of something that lives on.
                state._values = {one.name: values[one.name].clone() for one in self.states}
            return outputs

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
            values[one.name] = torch.from_numpy(np.array(array, order="C")).to(self._storage(type))
        return values

    def _states(self, state: State | None) -> dict[str, Tensor]:
        types = {one.name: self._types[one.name] for one in self.states}
        if state is None:
            if types:
                raise ProgramError(
                    f"`{self.name}` keeps {sorted(types)} between calls and was given no state",
                    hint="make one with `make_state()` and give it to every call",
                )
            return {}
        if state._types != types:
            raise ProgramError(f"the state is another program's: `{self.name}` keeps {sorted(types)}")
        return {name: value.to(self._storage(types[name])) for name, value in state._values.items()}

    def _storage(self, type: TensorType) -> torch.dtype:
        return torch.float32 if self._wide and type.element is FP16 else type.element.storage

    def _seen(self, value: Tensor, type: TensorType) -> Array:
        return np.array(value.numpy(), order="C") if self._wide and type.element is FP16 else _array(value, type)

    def _derive(self, step: Step, at: int) -> Tensor:
        return self._run(step, {})[at]

    def _output(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        known = self._constants.get(name)
        if known is None:
            return values[name]
        assert not isinstance(known, str)
        return known.tensor()

    def _run(self, step: Step, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        operation, kernel = step.operation, step.kernel
        unrounded = self._wide and not operation.type.startswith(_CONSTANT_EXPRESSION)
        try:
            arguments = dict(step.fixed)
            for name, sources in step.sources.items():
                arguments[name] = self._argument(step, name, sources, values)
            if kernel.accumulates:
                half = operation.outputs[0][1].element is FP16
                arguments["accumulate"] = self.accumulate if half else "fp32"
            if unrounded and operation.type == _CAST and operation.outputs[0][1].element is FP16:
                return self._checked(step, (arguments["x"].float(),), unrounded)
            found = in_pieces(operation.type, kernel, arguments)
            return self._checked(step, found if isinstance(found, tuple) else (found,), unrounded)
        except ProgramError as error:
            raise ProgramError(f"operation {operation} of `{self.name}`: {error}") from error
        except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            # What torch makes of arguments that do not go together, on one line.
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ProgramError(f"operation {operation} of `{self.name}` cannot be computed: {reason}") from error

    def _checked(self, step: Step, results: tuple[Tensor, ...], unrounded: bool) -> tuple[Tensor, ...]:
        """Results in the types that the program declares: fp32 is rounded to fp16, all else must be so already."""
        if step.operation.type == WRITES_STATE:
            (name,) = step.operation.inputs["input"]
            outputs: Sequence[tuple[str, TensorType]] = ((name, self._types[name]),)
        else:
            outputs = step.operation.outputs
        if len(results) != len(outputs):
            raise ProgramError(f"{len(results)} values for {len(outputs)} outputs")
        found = []
        for (name, type), result in zip(outputs, results, strict=True):
            storage = torch.float32 if unrounded and type.element is FP16 else type.element.storage
            if unrounded and result.dtype == torch.float16:
                result = result.float()
            elif step.kernel.arithmetic and result.dtype == torch.float32 and storage == torch.float16:
                result = result.half()
            if result.dtype != storage or not type.admits(result.shape):
                raise ProgramError(f"`{name}` is {result.dtype}{list(result.shape)}, declared {type}")
            found.append(result)
        return tuple(found)

    def _argument(
        self, step: Step, name: str, sources: Sequence[Constant | str], values: Mapping[str, Tensor]
    ) -> Tensor | tuple[Tensor, ...] | Any:
        parameter = step.kernel.parameters[name]
        wide = self._wide and not step.operation.type.startswith(_CONSTANT_EXPRESSION)
        tensors = [self._source(one, values) for one in sources]
        if wide:
            tensors = [one.float() if one.dtype == torch.float16 else one for one in tensors]
        if parameter.kind == "tensor":
            return tensors[0]
        if parameter.kind == "tensors":
            return tuple(tensors)
        return parameter.read(tensors, None, f"parameter `{name}`")

    def _source(self, source: Constant | str, values: Mapping[str, Tensor]) -> Tensor:
        if isinstance(source, str):
            return values[source]
        if not source.fresh:
            return source.tensor()
        kept = self._kept.get(id(source))
        if kept is None:
            kept = source.tensor()
            size = kept.numel() * kept.element_size()
            if size <= self._room:
                self._room -= size
                self._kept[id(source)] = kept
        return kept


def _array(value: Tensor, type: TensorType) -> Array:
    """A copy as numpy has it: values share memory with each other and with the weight file."""
    return np.array(value.numpy(), dtype=type.element.numpy, order="C")
