"""What executes an artifact on a host without the runtime that it is made for.

A number that a stand-in computed is true of the file and says nothing about a device's arithmetic, and its time says
nothing at all: every report that could be taken for a device's says who executed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array, Executable

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Sums = Literal["fp32", "fp16"]
"""How an evaluator keeps sums of float16 products: rounded once at the end, or partial sums too (to see the risk)."""
Arithmetic = Literal["declared", "fp32"]
Keep = Callable[[str, str, Array], None]
"""Sees each value as it is computed: its name in the artifact, the op's type, the array."""


@runtime_checkable
class Evaluated(Protocol):
    """A backend with an evaluator of its own for its artifacts, beside the runtime that they are made for."""

    name: str

    def executed_by(self) -> str | None:
        """Who executes artifacts that `load` gives on this host, None for the runtime itself; reads after "executed
        by"."""
        ...

    def evaluator_missing(self) -> tuple[str, ...]:
        """Modules that the evaluator needs and that are not installed."""
        ...

    def evaluator(
        self,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        accumulate: Sums = "fp32",
    ) -> Executable:
        """As `load`, always by the evaluator."""
        ...

    def each_value(
        self, path: Path, inputs: Mapping[str, Array], keep: Keep, *, arithmetic: Arithmetic = "declared"
    ) -> None:
        """Compute the artifact once and show every value; `arithmetic` "fp32" rounds nothing to float16."""
        ...

    def nodes_of_values(
        self, program: ExportedProgram, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> dict[str, str]:
        """Name of a value in the artifact -> node of the graph that it was lowered from, whose value it is."""
        ...

    def value_stem(self, name: str) -> str:
        """A value's name without what the converter appends to it: what `nodes_of_values` knows it by."""
        ...


def executed_by(backend: object) -> str | None:
    """Who executes a backend's artifacts on this host in place of their runtime; None where the runtime itself does."""
    return backend.executed_by() if isinstance(backend, Evaluated) else None
