"""The table of operations: one function each, whose signature says which parameters the operation has.

An operation's parameters are read from its function: annotated `Tensor` it takes any value, `tuple[Tensor, ...]`
several; annotated `int`, `float`, `bool`, `str`, `Literal[...]` or a tuple of numbers it takes a value that is known
before the program runs, or, numbers, one that is computed. A parameter without default must be there, one that the
function does not have is unknown, and both are errors before anything runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from mlprogram.errors import ProgramError

Accumulate = Literal["fp32", "fp16"]
Arithmetic = Literal["declared", "fp32"]
Function = Callable[..., Tensor | tuple[Tensor, ...]]
_Function = TypeVar("_Function", bound=Function)


@dataclass(frozen=True)
class Parameter:
    """`kind` is "tensor", "tensors" or the Python type that the function wants (of the elements, if `vector`)."""

    kind: str
    vector: bool
    required: bool
    choices: tuple[str, ...] = ()

    def read(self, tensors: list[Tensor], text: str | None, what: str) -> Any:
        """The Python value for the function, from one tensor, several, or a string."""
        if self.kind == "str":
            if text is None:
                raise ProgramError(f"{what} is not a string")
            if self.choices and text not in self.choices:
                raise ProgramError(f"{what} is `{text}`, known are {', '.join(self.choices)}")
            return text
        if text is not None:
            raise ProgramError(f"{what} is a string, expected {self.kind}")
        numbers = [number for one in tensors for number in one.flatten().tolist()]
        if not self.vector and len(numbers) != 1:
            raise ProgramError(f"{what} has {len(numbers)} elements, expected one")
        for one in tensors:
            if (one.dtype == torch.bool) != (self.kind == "bool") or (self.kind == "int" and one.is_floating_point()):
                raise ProgramError(f"{what} is {one.dtype}, expected {self.kind}")
        return tuple(numbers) if self.vector else numbers[0]


@dataclass(frozen=True)
class Kernel:
    """An operation's function. `arithmetic`: fp16 comes as fp32, and what comes back is rounded to the output's type.

    `alike` are the parameters that must have one element type (no promotion takes place in an ML Program).
    """

    function: Function
    parameters: Mapping[str, Parameter]
    arithmetic: bool
    alike: tuple[str, ...]
    accumulates: bool
    """Whether it takes `accumulate`, the type in which sums are kept while fp16 is computed."""


KERNELS: dict[str, Kernel] = {}


def arithmetic(*names: str, alike: tuple[str, ...] = ()) -> Callable[[_Function], _Function]:
    """Register an operation that computes: fp16 arrives as fp32, the result is rounded once."""
    return _register(names, True, alike)


def exact(*names: str, alike: tuple[str, ...] = ()) -> Callable[[_Function], _Function]:
    """Register an operation that moves or reinterprets values: they come and go in their own types."""
    return _register(names, False, alike)


def _register(names: tuple[str, ...], computes: bool, alike: tuple[str, ...]) -> Callable[[_Function], _Function]:
    def add(function: _Function) -> _Function:
        parameters = {}
        hints = get_type_hints(function)
        for name, one in inspect.signature(function).parameters.items():
            if name != "accumulate":
                parameters[name] = _parameter(hints[name], one.default is inspect.Parameter.empty)
        kernel = Kernel(function, parameters, computes, alike, "accumulate" in hints)
        for name in names:
            assert name not in KERNELS, name
            KERNELS[name] = kernel
        return function

    return add


def _parameter(hint: Any, required: bool) -> Parameter:
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not NoneType)
    if get_origin(hint) is Literal:
        return Parameter("str", False, required, get_args(hint))
    vector = get_origin(hint) is tuple
    of = get_args(hint)[0] if vector else hint
    if of is Tensor:
        return Parameter("tensors" if vector else "tensor", vector, required)
    assert of in (int, float, bool, str), hint
    return Parameter(of.__name__, vector, required)
