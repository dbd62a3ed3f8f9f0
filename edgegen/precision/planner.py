"""Plans, made and read: the two doors between this folder and the rest of the compiler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.export import ExportedProgram

from edgegen.cache import Cache
from edgegen.errors import UsageError
from edgegen.precision.asked import Asked
from edgegen.precision.canonical import canonical_programs
from edgegen.precision.cost import places, refusal
from edgegen.precision.file import PlanFileError, bad_ranges, load_plan, nearest, write_plan
from edgegen.precision.options import Planned, PlanOptions, Progress
from edgegen.precision.plan import COMPRESSED, ComponentPlan, OpPlan, PrecisionPlan
from edgegen.precision.prompts import check_prompts, default_settings, prompts_for
from edgegen.precision.repair.q_sched import FARTHEST
from edgegen.precision.repair.tensors import save
from edgegen.precision.repair.trained import check_memory
from edgegen.precision.simulate import Network
from edgegen.precision.sites import Site, sites
from edgegen.precision.stages import Stages
from edgegen.students.student import Student
from edgegen.targets import Target
from edgegen.targets.model import Place


def make_plan(
    student: Student,
    target: Target,
    backends: Sequence[str],
    options: PlanOptions,
    cache: Cache,
    progress: Progress,
    programs: Mapping[str, ExportedProgram] | None = None,
) -> Planned:
    """The plan of `student` for `target` that all of `backends` execute natively. `programs`: as `canonical_programs`
    gives them.

    UsageError for what cannot be asked of this student or target, GateError for a budget that no plan keeps to.
    """
    _check(student, target, backends, options)
    progress.stage("capture, canonical passes", 1)
    made = programs if programs is not None else canonical_programs(student, backends)
    networks = {name: Network(name, program, sites(program)) for name, program in made.items()}
    if options.qat is not None:
        check_memory(networks)
    progress.advance()
    return Stages(Asked(student, target, tuple(backends), options, cache, progress, networks)).make()


def write_planned(path: Path, planned: Planned) -> None:
    """Write the plan to `path` and, where repairs changed any, their tensors beside it: the same name with the suffix
    `.safetensors`. The plan comes last, so that one that is there has its tensors."""
    if planned.tensors:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path.with_suffix(".safetensors"), planned.tensors)
    write_plan(path, planned.plan, planned.notes)


def _check(student: Student, target: Target, backends: Sequence[str], options: PlanOptions) -> None:
    for name in backends:
        if name not in target.backends:
            usable = ", ".join(f"`{known}`" for known in target.backends)
            raise UsageError(f"target `{target.name}` does not run `{name}`", hint=f"this target runs {usable}")
    known = ("fp32", "fp16", *COMPRESSED)
    for precision in options.precisions or ():
        if precision not in known:
            raise UsageError(f"precision `{precision}` is unknown", hint=f"choose from {', '.join(known)}")
        without = [name for name in backends if precision not in target.backend(name).precisions]
        if without:
            raise _not_executed(precision, without[0], target)
    if student.config.sampler is not None:  # all of them, before anything is computed: those at the end judge the plan
        check_prompts(student, prompts_for(student, options.calibration), default_settings().fewest)
    if options.min_alignment is not None and student.config.name != "shapes":
        raise UsageError(
            f"the alignment of student `{student.config.name}` cannot be judged: only pictures of `shapes` can",
            hint="ask for `--min-psnr` instead",
        )


_CONSTANT_SCALES = ("coreml", "coreai")
"""Runtimes whose int8 arithmetic has scales that are constants of the file."""
_INSTEAD = {"w8a8-dynamic": ("w8a8", "w8"), "w8a8": ("w8a8-dynamic", "w8"), "w8": ("w8a8", "w8a8-dynamic", "w6")}


def _not_executed(precision: str, backend: str, target: Target) -> UsageError:
    """Why, as far as it is known, and what to ask for in its place."""
    offered = target.backend(backend).precisions
    said = f"target `{target.name}` does not execute {precision} with `{backend}`"
    if precision == "w8a8-dynamic" and backend in _CONSTANT_SCALES:
        said += ": scales of its int8 arithmetic are constants of the file, and these are found at run time"
    instead = next((one for one in _INSTEAD.get(precision, ()) if one in offered), None)
    asked = "" if instead is None else f"`--precision-set {instead}`; "
    return UsageError(said, hint=f"{asked}it has {', '.join(offered)}")


def read_plan(
    path: Path, student: Student, target: Target, programs: Mapping[str, ExportedProgram] | None = None
) -> PrecisionPlan:
    """The plan in the file at `path`, which must be one for `student` on `target`; `programs` as for `make_plan`.

    PlanFileError, with a line for each thing that is wrong: made for another student or target, a component or op that
    the student does not have (with the nearest), an op of another kind, a precision that a runtime of the plan does not
    execute there (with the target file's reason).
    """
    plan = load_plan(path)
    check_plan(plan, student, target, programs, where=f"{path}:")
    return plan


def check_plan(
    plan: PrecisionPlan,
    student: Student,
    target: Target,
    programs: Mapping[str, ExportedProgram] | None = None,
    where: str = "",
) -> None:
    """As `read_plan` does of a plan that is at hand."""
    if plan.student_sha256 != student.fingerprint:
        named = f"`{plan.student}` ({plan.student_sha256[:12]})"
        raise PlanFileError(
            [f"{where}student_sha256: the plan was made for {named}, not for {student.fingerprint[:12]}"],
            hint="plans are of one checkpoint: `edgegen plan` makes one for this model",
        )
    if plan.target != target.name:
        raise PlanFileError(
            [f"{where}target: the plan was made for target `{plan.target}`, not for `{target.name}`"],
            hint=f"`--target {plan.target}`, or make a plan for `{target.name}`",
        )
    stray = [name for name in plan.backends if name not in target.backends]
    if stray:
        raise PlanFileError([f"{where}backends: target `{target.name}` does not run `{stray[0]}`"])
    _check_codes(plan, target, where)
    problems = _sampler_problems(plan, student, where)
    made = programs if programs is not None else canonical_programs(student, plan.backends)
    for name, part in plan.components.items():
        if name not in made:
            problems.append(f"{where}components.{name}: the student has no such component{nearest(name, made)}")
            continue
        known = sites(made[name])
        at = places(made[name], known)
        problems += [
            f"{where}components.{name}.{line}" for line in _component_problems(part, known, at, plan.backends, target)
        ]
    if problems:
        raise PlanFileError(problems, hint="change those lines, or make the plan again")


def _sampler_problems(plan: PrecisionPlan, student: Student, where: str) -> list[str]:
    """Of the factors that a plan has for the sampler's steps."""
    known = {} if student.config.sampler is None else student.config.sampler.times
    problems = []
    for steps, factors in plan.sampler.items():
        if steps not in known:
            problems.append(f"{where}sampler.{steps}: the student does not draw in {steps} steps")
        elif len(factors) != len(known[steps]):
            problems.append(f"{where}sampler.{steps}: has {len(factors)} pairs of factors for {steps} steps")
        elif any(not math.isfinite(one) or abs(one - 1.0) > 2 * FARTHEST for pair in factors for one in pair):
            problems.append(f"{where}sampler.{steps}: a factor is not near 1")
    return problems


def _component_problems(
    part: ComponentPlan,
    known: Mapping[str, Site],
    at: Mapping[str, tuple[Place, ...]],
    backends: Sequence[str],
    target: Target,
) -> list[str]:
    runtimes = [target.backend(name) for name in backends]
    problems = [
        f"float_precision: `{on.name}` does not execute {part.float_precision} here"
        for on in runtimes
        if part.float_precision not in on.precisions
    ]
    for key, op in part.ops.items():
        where = f"ops.{key}"
        if key not in known:
            problems.append(f"{where}: the student has no such op{nearest(key, known)}")
        elif op.op != known[key].kind:
            problems.append(f"{where}.op: it is a {known[key].kind}, not a {op.op}")
        elif op.weights and op.weights != known[key].weights:
            problems.append(f"{where}.weights: it has {known[key].weights} in the graph of the plan's backends")
        else:
            reasons = [refusal(op.op, op.precision, at[key], on) for on in runtimes]
            problems += [f"{where}.precision: {op.precision} is refused: {one}" for one in reasons if one]
            problems += [f"{where}.{one}: is not finite" for one in bad_ranges(op)]
            problems += _group_problems(where, op, known[key])
    return problems


def _check_codes(plan: PrecisionPlan, target: Target, where: str) -> None:
    """A plan for runtimes whose kernels give float is none for others."""
    bare = [
        (f"components.{name}.ops.{key}", op)
        for name, part in plan.components.items()
        for key, op in part.ops.items()
        if op.precision == "w8a8" and op.output is None
    ]
    for backend in plan.backends:
        costs = [target.backend(backend).cost(op.op, "w8a8") for _, op in bare]
        if any(cost is None or not cost.float_output for cost in costs):
            raise PlanFileError(
                [
                    f"{where}{bare[0][0]}: w8a8 without a range `output`, and so are {len(bare) - 1} more: "
                    f"the plan is for runtimes that end such an op in float, and `{backend}` does not"
                ],
                hint=f"make the plan again with `--backend {','.join(plan.backends)}`",
            )


def _group_problems(where: str, op: OpPlan, site: Site) -> list[str]:
    if not op.group or op.precision not in COMPRESSED:
        return []
    which = "output" if op.form == "palette" else "input"
    channels = site.shape[site.axis] if op.form == "palette" else site.shape[1 - site.axis]
    if channels % op.group:
        return [f"{where}.group: groups of {op.group} do not divide {channels} {which} channels"]
    return []
