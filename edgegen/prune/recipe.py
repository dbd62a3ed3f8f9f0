"""What a search chose for one student, as plain data: what is taken out of it, and the precision of every op."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from edgegen.errors import UsageError
from edgegen.files import read_text
from edgegen.precision.plan import OpPrecision
from edgegen.prune.apply import pruned
from edgegen.students.pruning import Pruning
from edgegen.students.student import Student

SIZE_LIMIT = 64 << 20
"""Bytes of a recipe."""


class Recipe(BaseModel):
    """`estimated`: costs of the choice as shares of the student's (`latency <backend>`, `macs`, `bytes`), and the
    decibels of its picture, precisions included. `measured`: decibels of the picture of what is left, in float and
    without healing, and the alignment of `shapes`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    student: str
    student_sha256: str
    target: str
    target_sha256: str
    backends: tuple[str, ...]
    prunings: dict[str, Pruning]
    precisions: dict[str, dict[str, OpPrecision]]
    estimated: dict[str, float]
    measured: dict[str, float]

    def require_for(self, target: str, backends: Sequence[str]) -> None:
        """UsageError where it was made for another target, or for others than `backends`."""
        if self.target != target:
            raise UsageError(
                f"the recipe was made for target `{self.target}`, not for `{target}`",
                hint=f"`--target {self.target}`, or `edgegen tune` for `{target}`",
            )
        stray = [name for name in backends if name not in self.backends]
        if stray:
            raise UsageError(
                f"the recipe was made for {', '.join(self.backends)}, not for `{stray[0]}`",
                hint=f"`--backend {','.join(self.backends)}`, or `edgegen tune` for `{stray[0]}`",
            )


def write_recipe(path: Path, recipe: Recipe) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(recipe.model_dump_json(indent=1) + "\n")
    beside.replace(path)


def read_recipe(path: Path) -> Recipe:
    """UsageError for what is none, with the first key that does not fit."""
    try:
        return Recipe.model_validate_json(read_text(path, SIZE_LIMIT))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its top level"
        raise UsageError(
            f"recipe `{path}` does not fit at `{where}`: {first['msg']}", hint="`edgegen tune` writes recipes"
        ) from error


def require_left_by(recipe: Recipe, student: Student) -> None:
    """UsageError unless `student` is what the recipe leaves, healed or not: as many positions of everything that is
    cut, and the same blocks gone."""
    for name, cut in recipe.prunings.items():
        config = student.config.components.get(name)
        record = Pruning() if config is None or config.pruning is None else config.pruning
        same = all(
            len(record.positions(parameter, dim) or ()) == len(cut.positions(parameter, dim) or ())
            for parameter, dims in cut.cuts.items()
            for dim in dims
        )
        if not same or not set(cut.removed) <= set(record.removed):
            raise UsageError(
                f"the {name} of `{student.config.name}` is not what the recipe leaves of it",
                hint="first `edgegen prune MODEL --recipe FILE --heal 2000 -o healed.pt`, then plan healed.pt",
            )


def follow(recipe: Recipe, student: Student) -> Student:
    """What the recipe leaves of `student`; UsageError where it is one for another student."""
    if recipe.student_sha256 != student.fingerprint:
        raise UsageError(
            f"the recipe was made for `{recipe.student}` ({recipe.student_sha256[:12]}), not for "
            f"{student.fingerprint[:12]}",
            hint="recipes are of one checkpoint: `edgegen tune` makes some for this model",
        )
    stray = [name for name in recipe.prunings if name not in student.components]
    if stray:
        raise UsageError(
            f"the recipe cuts component `{stray[0]}`, which `{recipe.student}` does not have",
            hint="`edgegen tune` writes recipes",
        )
    return pruned(student, recipe.prunings)
