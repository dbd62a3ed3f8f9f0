"""What a precision plan changes in a build: repaired tensors, the reference that artifacts are held to, the sampler."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgegen.build.graphs import Graphs
from edgegen.build.recipe import Recipe
from edgegen.bundle.manifest import PlanBound, PlanRecord, SamplerTable
from edgegen.precision.file import write_plan
from edgegen.precision.plan import PrecisionPlan
from edgegen.precision.reference import fake_quant_reference
from edgegen.precision.repair.tensors import Tensors, apply, by_component, load
from edgegen.rewrite.pipeline import pipeline_of
from edgegen.students.student import Student
from edgegen.verify.gates import PLAN_FLOAT32_DB
from edgegen.verify.metrics import sqnr_db
from edgegen.verify.trajectory import Reference, Sample

PLAN, TENSORS = "plan.toml", "plan.safetensors"


@dataclass(frozen=True)
class Realised:
    """One recipe's plan, opened: `repaired` holds what repairs changed in each component."""

    plan: PrecisionPlan
    file: Path | None
    repaired: Mapping[str, Tensors]
    canonical: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Component -> the passes that made the graph it is of."""

    def files(self, work: Path) -> dict[str, Path]:
        """What the bundle carries of it: name -> file, the plan written to `work`."""
        write_plan(work / PLAN, self.plan)
        return {PLAN: work / PLAN, **({TENSORS: self.file} if self.file is not None else {})}

    def record(self, truth: Reference) -> PlanRecord:
        """What the manifest says of it."""
        return PlanRecord(
            path=PLAN,
            tensors=None if self.file is None else TENSORS,
            predicted=dict(self.plan.predicted),
            repairs=self.plan.repairs,
            front=self.plan.front,
            bounds=dict(truth.bounds),
            canonical=dict(self.canonical),
        )

    def compressed(self, component: str) -> dict[str, int]:
        """Precision -> ops of one component."""
        part = self.plan.components.get(component)
        return {} if part is None else dict(sorted(Counter(op.precision for op in part.ops.values()).items()))

    def sampler(self, table: SamplerTable) -> SamplerTable:
        """The schedule with the factors that were learned on the quantized student (Q-Sched)."""
        tables = {}
        for steps, rows in table.tables.items():
            factors = self.plan.sampler.get(steps, ((1.0, 1.0),) * len(rows))
            tables[steps] = tuple(
                row.model_copy(update={"sample": row.sample * a, "prediction": row.prediction * b})
                for row, (a, b) in zip(rows, factors, strict=True)
            )
        return table.model_copy(update={"tables": tables})


def realise(recipe: Recipe) -> Realised | None:
    """The plan of `recipe` with its tensors read; EdgegenError when they are not those of the plan."""
    if recipe.plan is None:
        return None
    found: dict[str, Tensors] = {}
    if recipe.repaired is not None and recipe.plan.tensors_sha256 is not None:
        found = by_component(load(recipe.repaired, recipe.plan.tensors_sha256))
    return Realised(recipe.plan, recipe.repaired, found, recipe.canonical)


def with_plan(truth: Reference, realised: Realised, student: Student, recipe: Recipe, graphs: Graphs) -> Reference:
    """`truth` with what the plan itself computes on the same inputs: artifacts are held to that."""
    programs = {
        name: apply(
            graphs.canonical(part, pipeline_of(recipe.canonical[name])).program,
            realised.repaired.get(name, {}),
        )
        for name, part in student.components.items()
    }
    plans = {name: part for name, part in realised.plan.components.items() if part.compressed}
    samples = {name: truth.samples[name] for name in plans}
    planned = fake_quant_reference(programs, plans, samples)
    moved = fake_quant_reference(programs, plans, samples, moved=True)
    halves = {name: part for name, part in plans.items() if part.float_precision == "fp16"}
    halved = fake_quant_reference(programs, halves, {name: samples[name] for name in halves}, half=True)
    bounds = {
        name: PlanBound(
            stability_db=_worst(planned[name], moved[name]),
            float_db=_worst(samples[name], planned[name]),
            asked_db=PLAN_FLOAT32_DB if part.float_precision == "fp32" else None,
            half_db=_finite(_worst(planned[name], halved[name])) if name in halves else None,
        )
        for name, part in plans.items()
    }
    return replace(truth, planned=planned, bounds=bounds)


def _finite(value: float) -> float | None:
    """None for what float16 cannot hold without the repairs that a target's passes make: it says nothing then."""
    return value if math.isfinite(value) else None


def _worst(expected: Sequence[Sample], found: Sequence[Sample]) -> float:
    """dB, over every output of every call; 200 where all are equal, which JSON has a number for."""
    pairs = [(a.outputs[name], b.outputs[name]) for a, b in zip(expected, found, strict=True) for name in a.outputs]
    return min(200.0, min(sqnr_db(a, b) for a, b in pairs))
