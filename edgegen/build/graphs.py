"""From a component to the graph that a backend lowers: capture, the canonical passes, the target's passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch.export import ExportedProgram

from edgegen.graph.capture import capture, signature
from edgegen.graph.export_lock import EXPORT_LOCK
from edgegen.precision.plan import ComponentPlan, OpPlan
from edgegen.precision.quantize import on_grid, quantized, settled
from edgegen.precision.repair.tensors import Tensors, apply
from edgegen.precision.sites import resolve
from edgegen.rewrite.forecast import Forecast, forecast
from edgegen.rewrite.half_hazards import Hazard
from edgegen.rewrite.half_safety import make_half_safe
from edgegen.rewrite.pipeline import Observer, PassRecord, Pipeline
from edgegen.students.student import Component
from edgegen.verify.trajectory import Sample, Signature


@dataclass(frozen=True)
class Rewriting:
    """A graph, what made it of the captured one, and its signature: passes may take inputs out or replace them."""

    program: ExportedProgram
    records: tuple[PassRecord, ...]
    signature: Signature
    hazards: tuple[Hazard, ...] = ()
    """What float16 would have broken, and what was done about it; () for float32."""
    islands: tuple[str, ...] = ()
    """Calls that stay in float32, where it is the converter who casts."""
    quantized: Mapping[str, OpPlan] = field(default_factory=dict)
    """Calls of the graph -> how a plan has them compressed."""
    half_db: float | None = None
    """What float16 arithmetic, emulated on the samples, leaves of the signal; None where it was not asked for."""


class Graphs:
    """Graphs of one student's components, each made once and only when something asks for it."""

    def __init__(self) -> None:
        self._captured: dict[str, ExportedProgram] = {}
        self._rewritten: dict[tuple[str, str], Rewriting] = {}
        self._lock = EXPORT_LOCK

    def captured(self, component: Component) -> ExportedProgram:
        """The component as it was traced, in fp32."""
        with self._lock:
            if component.fingerprint not in self._captured:
                self._captured[component.fingerprint] = capture(component)
            return self._captured[component.fingerprint]

    def canonical(self, component: Component, pipeline: Pipeline) -> Rewriting:
        """After the passes that every target shares."""
        key = (component.fingerprint, str(pipeline))
        with self._lock:
            if key not in self._rewritten:
                program, records = pipeline.run(self.captured(component))
                found = Signature(signature(program), component.outputs)
                self._rewritten[key] = Rewriting(program, records, found)
            return self._rewritten[key]

    def shaped(
        self, component: Component, canonical: Pipeline, shape: Pipeline, observers: tuple[Observer, ...] = ()
    ) -> Rewriting:
        """After the target's passes too; not kept, since each is lowered once. `observers` see the canonical passes
        as well."""
        with self._lock:
            if observers:
                canonical.run(self.captured(component), observers)
            start = self.canonical(component, canonical)
            program, records = shape.run(start.program, observers)
            return Rewriting(program, start.records + records, Signature(signature(program), component.outputs))

    def forecast(self, rewriting: Rewriting, backend: str) -> Forecast:
        """How many pieces `backend` will make of a graph."""
        with self._lock:
            return forecast(rewriting.program, backend)

    def half(
        self, component: Component, canonical: Pipeline, shape: Pipeline, samples: Sequence[Sample], *, cast: bool
    ) -> Rewriting:
        """As `shaped`, and safe for float16 on `samples`; with `cast` in float16 but for its islands."""
        with self._lock:
            return _half(self.shaped(component, canonical, shape), samples, cast=cast)

    def planned(
        self,
        component: Component,
        canonical: Pipeline,
        shape: Pipeline,
        plan: ComponentPlan,
        repaired: Tensors,
        samples: Sequence[Sample],
        *,
        half: Literal["cast", "safe"] | None,
        quantizes: Literal["graph", "file"],
    ) -> Rewriting:
        """As `shaped`, compressed as `plan` says, from the canonical graph with the tensors that repairs changed.

        `half`: in float16 between what is quantized, cast here or by the converter. `quantizes` is the backend's.
        """
        with self._lock:
            start = self.canonical(component, canonical)
            base = apply(start.program, repaired)
            program, records = shape.run(settled(base, plan))
            made = replace(start, program=program, records=start.records + records)
            made = replace(made, signature=Signature(signature(program), component.outputs))
            if half is not None:
                made = _half(made, samples, cast=half == "cast")
            ops = resolve(made.program, plan, base)
            write = quantized if quantizes == "graph" else on_grid
            return replace(made, program=write(made.program, ops), quantized=ops)


def _half(start: Rewriting, samples: Sequence[Sample], *, cast: bool) -> Rewriting:
    given = [{name: torch.from_numpy(np.array(v)) for name, v in one.inputs.items()} for one in samples]
    safe = make_half_safe(start.program, given)
    program, records = Pipeline(safe.passes if cast else safe.rewrites).run(start.program)
    return replace(
        start,
        program=program,
        records=start.records + records,
        hazards=safe.hazards + safe.remaining,
        islands=() if cast else safe.to_half.islands,
        half_db=safe.after_db,
    )
