"""The one interface behind which every backend stands.

`lower` runs in a child process (`edgegen.lower.worker`); `load` runs wherever the artifact is executed, and imports
nothing
that the runtime itself does not need (no torch for TFLite and ONNX).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from edgegen.errors import UsageError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.precision.plan import OpPlan
from edgegen.precision.plan import Precision as Precision

if TYPE_CHECKING:
    from torch.export import ExportedProgram

HeldTo = Literal["fp32", "fp16", "plan"]
"""Which thresholds an artifact is held to."""
Array = NDArray[np.generic]


class Delegation(BaseModel):
    """How much of an artifact its accelerator takes. `known` False: this host cannot tell, and `note` says why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    delegate: str
    known: bool
    delegated_ops: int | None = None
    total_ops: int | None = None
    pieces: int | None = None
    undelegated: dict[str, int] = {}
    """Op type -> count of what stays outside, each op a place where a piece is cut."""
    note: str = ""

    @property
    def full(self) -> bool:
        return self.known and not self.undelegated and self.pieces == 1


class Lowered(BaseModel):
    """What a backend made of one component: `file` is relative to the request's `out_dir`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    delegation: Delegation
    details: dict[str, str] = {}
    """Facts worth recording: opset, deployment target, IR version, quantizer recipe, ..."""
    notes: tuple[str, ...] = ()
    """What was declined or done differently, and why; shown in the report."""


@dataclass(frozen=True)
class LowerRequest:
    """One component to lower. Graph inputs and outputs are in the order of the specs; fp16 artifacts keep float32
    IO."""

    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: Precision
    out_dir: Path
    options: Mapping[str, str] = field(default_factory=dict)
    """Backend options from the target file, e.g. {"minimum_deployment_target": "iOS17"}."""
    islands: tuple[str, ...] = ()
    """Calls of the graph that stay in float32 at fp16, for a backend that converts to fp16 itself (`half` converter);
    the others are given them as casts."""
    quantized: Mapping[str, OpPlan] = field(default_factory=dict)
    """Calls of the graph -> how each is compressed, its ranges as they are in this graph. For a backend whose
    `quantizes` is "graph", quantize and dequantize ops already surround what has int8 arithmetic and affine weights of
    one scale an output channel are already int8; what remains of the entries (groups, palettes) has weights that lie
    exactly on their grid. Where it is "file" the graph is float, its weights on their grid too."""


class Executable(Protocol):
    """A loaded artifact: named numpy arrays in, named numpy arrays out, as the component's specs say."""

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...

    def close(self) -> None: ...


class Backend(Protocol):
    """`extra` is the pip extra that brings it; `lower_modules` and `run_modules` are what must import for each half."""

    name: str
    extra: str
    suffix: str
    precisions: tuple[Precision, ...]
    half: Literal["graph", "converter", "storage"]
    """fp16 is made of a float16 graph; by the converter, of a float32 one; or of float16 weights alone."""
    quantizes: Literal["graph", "file"]
    """int8 is made of a graph with quantize and dequantize ops, or on the file, from `LowerRequest.quantized`."""
    lower_modules: tuple[str, ...]
    run_modules: tuple[str, ...]
    distributions: tuple[str, ...]
    """Names on PyPI whose versions decide what comes out: part of the cache key and of the manifest."""

    def lower(self, program: ExportedProgram, request: LowerRequest) -> Lowered: ...

    def not_executed_here(self) -> str | None:
        """Why this host cannot execute the artifact, or None when it can (missing extras are not a reason)."""
        ...

    def load(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Executable: ...


BACKENDS = ("coreml", "coreai", "executorch", "tflite", "onnx")


def get_backend(name: str) -> Backend:
    """The backend called `name`; each module `edgegen.lower.<name>` exposes it as `BACKEND`. Imports no heavy
    library."""
    if name not in BACKENDS:
        known = ", ".join(f"`{known}`" for known in BACKENDS)
        raise UsageError(f"backend `{name}` is unknown", hint=f"choose from {known}")
    backend: Backend = import_module(f"edgegen.lower.{name}").BACKEND
    return backend
