"""Everything that the command line can say about where a student comes from, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegen.errors import UsageError

if TYPE_CHECKING:
    from edgegen.students.student import Student


@dataclass(frozen=True)
class Source:
    """A path, adapters to merge, and for a network of the user's own the code that makes it."""

    adapters: tuple[str, ...] = ()
    """`FILE` or `FILE:scale`, merged in this order."""
    arch: str | None = None
    """`package.module:factory`: code of the user, which is run."""
    arch_config: Path | None = None
    """JSON that the factory is called with."""
    inputs: Path | None = None
    """`.npz` with what a student without prompts is calibrated and verified on."""
    timesteps: tuple[str, ...] = ()
    """`999,749,499,249`: the times of one number of steps, in place of the scheduler's own."""
    guidance: float | None = None
    """What a network that is told its guidance is told, in place of its pipeline's default."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Source:
        """From the options of the command line (`edgegen.cli.student_source`)."""
        return cls(
            tuple(options["lora"]),
            options["arch"],
            options["arch_config"],
            options["inputs"],
            tuple(options["timesteps"]),
            options["guidance"],
        )

    def open(self, path: Path) -> Student:
        """The student at `path`; the errors of `edgegen.students.load.load` and of what is asked for here."""
        from edgegen.students.load import load

        if self.arch_config is not None and self.arch is None:
            raise UsageError("`--arch-config` is for a factory", hint="name it: `--arch package.module:factory`")
        rows = []
        if self.timesteps:
            from edgegen.students.timesteps import parse_timesteps

            rows = [parse_timesteps(text) for text in self.timesteps]
        arrays = None
        if self.inputs is not None:
            from edgegen.students.given_inputs import read_inputs

            arrays = read_inputs(self.inputs)
        if self.arch is None:
            student = load(path)
        else:
            from edgegen.students.trusted_code import Factory, load_trusted

            student = load_trusted(Factory(self.arch, self.arch_config), path, arrays)
        if self.guidance is not None:
            from edgegen.students.guidance import with_guidance

            student = with_guidance(student, self.guidance)
        if self.adapters:
            from edgegen.students.low_rank import parse_adapter, with_adapters

            student = with_adapters(student, [parse_adapter(text) for text in self.adapters])
        if rows:
            from edgegen.students.timesteps import with_timesteps

            student = with_timesteps(student, rows)
        if arrays is not None and self.inputs is not None:
            from edgegen.students.given_inputs import with_inputs

            student = with_inputs(student, arrays, self.inputs.name)
        return student


UNAVAILABLE = (
    "no prompts and no tokenizer: an app and `edgegen run --inputs FILE.npz` call the network by its inputs' names",
    "no sampler: one call is one result, and `--steps` has nothing to choose",
    "no trajectory: calibration and verification use {inputs}",
    "the gates on the picture and on conditioning fall away: SQNR of every output is what is asked for",
    "no alignment, no prompts in the plan: `edgegen plan` measures decibels of the outputs",
    "`--smoke` has no smaller copy to try: the network is a finished graph",
)
"""What a student of one component does without, in words."""


def unavailable(student: Student) -> tuple[str, ...]:
    """What cannot be had of `student`, which has one component and no prompts; empty for one that draws."""
    if student.config.task != "single":
        return ()
    (part,) = student.components.values()
    inputs = (
        f"the {len(part.examples)} given" if part.examples else "random numbers (give real ones: `--inputs FILE.npz`)"
    )
    return tuple(text.format(inputs=inputs) for text in UNAVAILABLE)
