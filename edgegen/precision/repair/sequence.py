"""The repairs of a plan, in their order, on the canonical graphs that it was made on.

    canonical graph -> equalise -> calibrate -> choose the plan -> [round weights -> correct biases] -> Q-Sched

What stands in brackets is `repair_component`; its tensors are laid over those of `equalise`, under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram

from edgegen.graph.capture import signature
from edgegen.graph.evaluate import evaluate
from edgegen.precision.conditioning import asked, pack
from edgegen.precision.plan import ComponentPlan, OpPlan
from edgegen.precision.quantize import quantized
from edgegen.precision.repair.bias_correction import correct_biases
from edgegen.precision.repair.q_sched import Denoiser, QSched, learn
from edgegen.precision.repair.round_weights import round_weights
from edgegen.precision.repair.tensors import RepairRecord, Samples, Tensors
from edgegen.precision.sites import sites
from edgegen.students.sampler import SamplerStep, moment
from edgegen.students.student import Student


def repair_component(
    program: ExportedProgram, plan: ComponentPlan, samples: Samples, held_out: Samples | None = None
) -> tuple[Tensors, tuple[RepairRecord, ...]]:
    """What rounding and then bias correction change in `program`, a canonical graph that `plan` (with ranges) is of.

    `samples` are calls' inputs by name, of the student's own trajectory; biases are judged on `held_out`. A repair that
    does not help changes nothing.
    """
    ops = _ops(program, plan)
    if not plan.compressed:
        return {}, ()
    rounded = round_weights(program, ops, samples)
    biased = correct_biases(program, rounded.program, ops, samples, held_out)
    return {**rounded.tensors, **biased.tensors}, (rounded.record, biased.record)


def learn_schedule(
    student: Student,
    programs: Mapping[str, ExportedProgram],
    repaired: Mapping[str, ExportedProgram],
    plans: Mapping[str, ComponentPlan],
    prompts: Sequence[str],
    steps: int,
    seed: int = 0,
) -> QSched:
    """Q-Sched of `student` as `plans` compute the graphs `repaired`, against the float graphs `programs`; components
    without a plan, or whose plan compresses nothing, stay float. Errors are those of `learn`."""
    made = {name: _computed(repaired.get(name, program), plans.get(name)) for name, program in programs.items()}
    ids, encoder = [student.given([prompt]) for prompt in prompts], student.conditioning.name
    return learn(
        student,
        _denoiser(student, programs["denoiser"]),
        _denoiser(student, made["denoiser"]),
        [_encoded(programs[encoder], one) for one in ids],
        steps,
        quantized_contexts=[_encoded(made[encoder], one) for one in ids],
        seed=seed,
    )


def _ops(program: ExportedProgram, plan: ComponentPlan) -> dict[str, OpPlan]:
    known = sites(program)
    return {known[key].node: op for key, op in plan.ops.items()}


def _computed(program: ExportedProgram, plan: ComponentPlan | None) -> ExportedProgram:
    return program if plan is None or not plan.compressed else quantized(program, _ops(program, plan))


def _denoiser(student: Student, program: ExportedProgram) -> Denoiser:
    """Latent, what it is asked for, and what tells it the step where that is not folded in."""
    names = tuple(spec.name for spec in signature(program))

    def call(x: Tensor, step: SamplerStep, context: Tensor) -> Tensor:
        given = {"latent": x, **asked(student, context, names)}
        given |= {name: torch.from_numpy(value) for name, value in moment(step, names).items()}
        return evaluate(program, given)[0]

    return call


def _encoded(program: ExportedProgram, ids: Tensor) -> Tensor:
    (name,) = (spec.name for spec in signature(program))
    return pack(evaluate(program, {name: ids}))
