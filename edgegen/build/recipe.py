"""What a build will do, resolved before it does anything: `--dry-run` prints it, the manifest records it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from edgegen.bundle.manifest import Gates
from edgegen.errors import UsageError
from edgegen.lower.backend import BACKENDS, Precision, get_backend
from edgegen.lower.requirements import require
from edgegen.rewrite.choose import Edits, canonical_preset, shape_preset
from edgegen.students.sample import sampler_table
from edgegen.students.student import Student
from edgegen.targets import Target
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


class BackendRecipe(BaseModel):
    """One backend of one build: its options come from the target file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    precision: Precision
    options: dict[str, str]
    passes: tuple[str, ...]
    """What its runtime wants, run on the canonical graph."""


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
    steps: int | None
    max_pieces: int | None = None
    """A graph that would be cut into more is not lowered."""
    gates: Gates
    output: Path

    def options(self) -> dict[str, str]:
        """What shaped the bundle, as flat text for the manifest."""
        chosen: dict[str, str] = {f"backend.{b.name}.precision": b.precision for b in self.backends}
        chosen |= {f"backend.{b.name}.{key}": value for b in self.backends for key, value in b.options.items()}
        return {**chosen, "steps": str(self.steps)} if self.steps else chosen


def resolve(student: Student, target: Target, options: BuildOptions, output: Path) -> Recipe:
    """Choose backends and precisions for `target`; UsageError when what was asked for cannot be had there.

    Without a choice the target's preferred backend is built. Nothing is replaced silently: a backend or precision that
    the target denies is an error with the target's reason, and every backend left out is listed with why.
    """
    names = _chosen_backends(target, options.backends)
    edits = Edits(options.passes)
    sampler = student.config.sampler
    timesteps = () if sampler is None else sampler.timesteps()
    presets = {name: canonical_preset(name, timesteps) for name in student.components}
    longest = max(presets.values(), key=len)
    recipes = []
    for name in names:
        spec = target.backend(name)
        precision = options.precision or spec.default_precision
        if precision not in spec.precisions or precision not in get_backend(name).precisions:
            offered = ", ".join(f"`--precision {p}`" for p in spec.precisions if p in get_backend(name).precisions)
            raise UsageError(
                f"target `{target.name}` does not execute {precision} with `{name}`", hint=f"use {offered}"
            )
        require(get_backend(name), "lower")
        shape = edits.shape(shape_preset(name), longest)
        recipes.append(BackendRecipe(name=name, precision=precision, options=dict(spec.options), passes=shape.specs()))
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
        steps=_steps(student, options.steps),
        max_pieces=options.max_pieces,
        gates=default_gates(require_full_delegation=options.require_full_delegation),
        output=output,
    )


def _chosen_backends(target: Target, asked: Sequence[str] | None) -> tuple[str, ...]:
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
