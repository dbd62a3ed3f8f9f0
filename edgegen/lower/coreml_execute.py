"""A `.mlpackage` that runs: by Core ML on macOS, and by edgegen's reference evaluator (`mlprogram`) on every host.

The evaluator computes what the saved package says, with Core ML's semantics. It is not Core ML: a time that it takes
is nobody's latency, and which unit of a phone computes what it does not know. So everything that it executed is told
as executed by it (`EVALUATOR`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array
from edgegen.lower.mlpackage import shown, split_function
from edgegen.lower.signature import check_call, reason

if TYPE_CHECKING:
    from mlprogram import Accumulate, Arithmetic, Operation, Program

EVALUATOR = "edgegen's reference evaluator (mlprogram), not by Core ML"
EVALUATOR_MODULES = ("coremltools", "torch", "mlprogram")

Watch = Callable[["Operation", tuple[Array, ...]], None]


def core_ml_is_here() -> bool:
    """Whether this host has Core ML itself."""
    return sys.platform == "darwin"


class CoreMLExecutable:
    """A model loaded by Core ML (macOS): named arrays in, named arrays out. What a `stateful` one keeps begins as zeros
    and goes from call to call until it is closed."""

    def __init__(
        self,
        model: Any,
        what: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        stateful: bool = False,
    ) -> None:
        self._model = model
        self._state = model.make_state() if stateful else None
        self._what = what
        self._inputs = inputs
        self._outputs = outputs

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._model is None:
            raise EdgegenError(f"{self._what} is closed")
        check_call(self._what, inputs, self._inputs)
        try:
            values = self._model.predict(dict(inputs), state=self._state)
        except Exception as error:
            raise EdgegenError(f"{self._what} failed while it ran: {reason(error)}") from error
        return {spec.name: np.asarray(values[spec.name], dtype=spec.dtype) for spec in self._outputs}

    def close(self) -> None:
        self._model = self._state = None


class EvaluatedExecutable:
    """A package that the evaluator executes: named arrays in, named arrays out, any host. Holds the package's weights,
    and what a stateful one keeps between calls (zeros at first), until it is closed."""

    def __init__(
        self, program: Program, what: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self._program: Program | None = program
        self._state = program.make_state() if program.states else None
        self._what = what
        self._inputs = inputs
        self._outputs = outputs

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        from mlprogram import ProgramError

        if self._program is None:
            raise EdgegenError(f"{self._what} is closed")
        check_call(self._what, inputs, self._inputs)
        try:
            values = self._program(inputs, state=self._state)
        except ProgramError as error:
            raise EdgegenError(f"{self._what} failed while it ran: {error}") from error
        return {spec.name: np.asarray(values[spec.name], dtype=spec.dtype) for spec in self._outputs}

    def close(self) -> None:
        self._program = self._state = None


def open_program(path: Path, *, accumulate: Accumulate = "fp32", arithmetic: Arithmetic = "declared") -> Program:
    """The package at `path`, or a function of one (`mlpackage.function_path`), for the evaluator.

    EdgegenError when it cannot be read or has something unknown to it.
    """
    from mlprogram import Program, ProgramError

    package, function = split_function(path)
    try:
        return Program.open(package, function=function, accumulate=accumulate, arithmetic=arithmetic)
    except ProgramError as error:
        raise EdgegenError(f"`{shown(path)}` cannot be loaded: {error}", hint=error.hint) from error


def watched(path: Path, inputs: Mapping[str, Array], watch: Watch, arithmetic: Arithmetic = "declared") -> None:
    """Compute the package at `path` once; `watch` sees every operation with its values. EdgegenError as in loading."""
    from mlprogram import ProgramError

    program = open_program(path, arithmetic=arithmetic)
    try:
        program(inputs, watch, state=program.make_state() if program.states else None)
    except ProgramError as error:
        raise EdgegenError(f"`{shown(path)}` failed while it ran: {error}") from error
