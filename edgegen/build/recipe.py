"""What a build will do, resolved before it does anything: `--dry-run` prints it, the manifest records it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from edgegen.build.residency import Ceiling
from edgegen.bundle.level import LevelChoice
from edgegen.bundle.manifest import Gates
from edgegen.errors import UsageError
from edgegen.lower.backend import BACKENDS, HeldTo, Precision, get_backend
from edgegen.lower.coreml_functions import function_name
from edgegen.lower.requirements import require
from edgegen.precision.canonical import canonical_passes, canonical_programs
from edgegen.precision.plan import PrecisionPlan
from edgegen.precision.planner import check_plan, read_plan
from edgegen.precision.repair.tensors import tensors_of
from edgegen.rewrite.choose import Edits, canonical_preset, shape_preset
from edgegen.students.sample import sampler_table
from edgegen.students.student import Student
from edgegen.targets import Target
from edgegen.targets.model import PACKAGE, PACKAGING, WITH_FUNCTIONS
from edgegen.verify.gates import default_gates


@dataclass(frozen=True)
class BuildOptions:
    """What the user asked for; None leaves the choice to the target or the student.

    `backends` is names, or ("all",) for every backend that the target has.
    """

    backends: tuple[str, ...] | None = None
    precision: Precision | None = None
    steps: int | None = None
    require_full_delegation: bool = False
    passes: str | None = None
    """Changes to the preset passes, as `edgegen.rewrite.choose.Edits` reads them."""
    max_pieces: int | None = None
    plan: Path | None = None
    """File of a precision plan."""
    max_memory: int | None = None
    """Bytes that an app may use, where the user knows better than the target file."""
    one_package: bool | None = None
    """Core ML: one package with a function for each component (True), or a package each (False)."""


class BackendRecipe(BaseModel):
    """One backend of one build: its options come from the target file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    precision: HeldTo
    """Of all components, or as the plan has it for each."""
    options: dict[str, str]
    passes: tuple[str, ...]
    """What its runtime wants, run on the canonical graph."""
    functions: dict[str, str] = {}
    """Component -> its function, where all components become one package; empty where each is one."""

    @property
    def lowering_options(self) -> dict[str, str]:
        """Those that decide what is made of one component, whatever becomes of it then."""
        return {key: value for key, value in self.options.items() if key != PACKAGE}


class Recipe(BaseModel):
    """One target's build."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: str
    student_sha256: str
    target: str
    target_sha256: str
    components: tuple[str, ...]
    backends: tuple[BackendRecipe, ...]
    declined: dict[str, str]
    """Backend -> why this build does not use it."""
    canonical: dict[str, tuple[str, ...]]
    """Component -> the passes that every backend shares."""
    plan: PrecisionPlan | None = None
    repaired: Path | None = None
    """The tensors that the plan's repairs changed."""
    level: LevelChoice | None = None
    """The size that this build takes, where there was anything to choose or to hold a size against."""
    steps: int | None
    max_pieces: int | None = None
    """A graph that would be cut into more is not lowered."""
    memory: Ceiling
    """What an app may use on the target."""
    gates: Gates
    output: Path

    def precision(self, backend: BackendRecipe, component: str) -> Precision:
        """Of the float arithmetic of one component."""
        if backend.precision != "plan":
            return backend.precision
        assert self.plan is not None
        part = self.plan.components.get(component)
        return "fp32" if part is None else part.float_precision

    def options(self) -> dict[str, str]:
        """What shaped the bundle, as flat text for the manifest."""
        chosen: dict[str, str] = {f"backend.{b.name}.precision": b.precision for b in self.backends}
        chosen |= {f"backend.{b.name}.{key}": value for b in self.backends for key, value in b.options.items()}
        if self.level is not None and self.level.name is not None:
            chosen["level"] = self.level.name
        return {**chosen, "steps": str(self.steps)} if self.steps else chosen


def resolve(student: Student, target: Target, options: BuildOptions, output: Path) -> Recipe:
    """Choose backends and precisions for `target`; UsageError when what was asked for cannot be had there.

    Without a choice the target's preferred backend is built. Nothing is replaced silently: a backend or precision that
    the target denies is an error with the target's reason, and every backend left out is listed with why.
    """
    plan = None if options.plan is None else _plan(options, student, target)
    names = chosen_backends(target, options.backends if plan is None else options.backends or plan.backends)
    edits = Edits(options.passes)
    sampler = student.config.sampler
    timesteps = () if sampler is None else sampler.timesteps()
    presets = {
        name: canonical_preset(name, timesteps)
        if plan is None
        else canonical_passes(name, timesteps, plan.backends).passes
        for name in student.components
    }
    if plan is not None and any(edits.canonical(preset).passes != preset for preset in presets.values()):
        raise UsageError(
            "`--passes` changes passes that came before the plan: its ranges and weights are of another graph",
            hint="change only what a target adds to them, or build without `--plan`",
        )
    longest = max(presets.values(), key=len)
    recipes = []
    for name in names:
        spec = target.backend(name)
        precision: HeldTo = "plan"
        if plan is None:
            precision = _precision(target, name, options.precision)
        require(get_backend(name), "lower")
        shape = edits.shape(shape_preset(name), longest)
        chosen = _packaging(target, name, dict(spec.options), options.one_package)
        functions = {part: function_name(part) for part in student.components} if chosen.get(PACKAGE) == "one" else {}
        recipes.append(
            BackendRecipe(name=name, precision=precision, options=chosen, passes=shape.specs(), functions=functions)
        )
    if options.one_package is not None and PACKAGING not in names:
        raise UsageError(
            f"this build makes nothing with `{PACKAGING}`, which is what packages are chosen for",
            hint=f"add `--backend {PACKAGING}`" if PACKAGING in target.backends else "leave the option out",
        )
    declined = {name: "not asked for; `--backend all` builds it too" for name in target.backends if name not in names}
    declined |= {name: reason for name, reason in target.denied_backends.items() if name not in declined}
    return Recipe(
        student=student.config.name,
        student_sha256=student.fingerprint,
        target=target.name,
        target_sha256=target.sha256,
        components=tuple(student.components),
        backends=tuple(recipes),
        declined=declined,
        canonical={name: edits.canonical(preset).specs() for name, preset in presets.items()},
        plan=plan,
        repaired=None if plan is None or options.plan is None else tensors_of(options.plan, plan),
        steps=_steps(student, options.steps),
        max_pieces=options.max_pieces,
        memory=_ceiling(target, options.max_memory),
        gates=default_gates(plan, require_full_delegation=options.require_full_delegation),
        output=output,
    )


def _ceiling(target: Target, asked: int | None) -> Ceiling:
    if asked is not None:
        return Ceiling(bytes=asked, source="`--max-memory`")
    known = target.device.app_memory
    return Ceiling(bytes=known.bytes, source=f"{target.name}, {known.known}: {known.source}")


def _precision(target: Target, backend: str, asked: Precision | None) -> Precision:
    spec = target.backend(backend)
    precision = asked or spec.default_precision
    if precision not in spec.precisions or precision not in get_backend(backend).precisions:
        offered = ", ".join(f"`--precision {p}`" for p in spec.precisions if p in get_backend(backend).precisions)
        raise UsageError(f"target `{target.name}` does not execute {precision} with `{backend}`", hint=f"use {offered}")
    return precision


def _plan(options: BuildOptions, student: Student, target: Target) -> PrecisionPlan:
    """The plan in a file; what it asks for is native in every backend of this build."""
    assert options.plan is not None
    if options.precision is not None:
        raise UsageError(
            f"`{options.plan}` says the precision of every op, `--precision {options.precision}` another",
            hint="leave one of them out, or change `float_precision` in the plan",
        )
    plan = read_plan(options.plan, student, target)
    if options.backends is not None:
        names = chosen_backends(target, options.backends)
        programs = canonical_programs(student, plan.backends)
        asked = plan.model_copy(update={"backends": names})
        check_plan(asked, student, target, programs, where=f"{options.plan}: ")
    return plan


def _packaging(target: Target, backend: str, options: dict[str, str], one_package: bool | None) -> dict[str, str]:
    """The target's `options` with what was asked for; UsageError for a system that knows one function a package."""
    if backend != PACKAGING or one_package is None:
        return options
    floor = options.get("minimum_deployment_target", "the default")
    if one_package and floor not in WITH_FUNCTIONS:
        raise UsageError(
            f"target `{target.name}` cannot have one package of several functions: they came with iOS 18, "
            f"and its packages are made for {floor} (it runs {target.device.os.name} {target.os_floor} and later)",
            hint="build without `--one-package`, or for a target whose floor is iOS 18, as `iphone16pro`",
        )
    return {**options, PACKAGE: "one" if one_package else "components"}


def chosen_backends(target: Target, asked: Sequence[str] | None) -> tuple[str, ...]:
    """What was asked for in the target's order, ("all",) for each; UsageError for what the target does not run."""
    if asked is None:
        return target.backends[:1]
    if tuple(asked) == ("all",):
        return target.backends
    for name in asked:
        if name not in BACKENDS:
            get_backend(name)  # raises with the list of those that exist
        if name not in target.backends:
            reason = target.denied_backends.get(name, "its target file does not list it")
            usable = ", ".join(f"`{known}`" for known in target.backends)
            raise UsageError(
                f"target `{target.name}` does not run `{name}`: {reason}", hint=f"this target runs {usable}"
            )
    return tuple(name for name in target.backends if name in asked)


def _steps(student: Student, asked: int | None) -> int | None:
    sampler = student.config.sampler
    if sampler is None:
        if asked is not None:
            raise UsageError(f"student `{student.config.name}` has no sampler", hint="build without `--steps`")
        return None
    steps = asked or sampler.default_steps
    sampler_table(student, steps)  # refuses steps that the student was not distilled for
    return steps
