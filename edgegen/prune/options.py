"""What `edgegen prune` is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgegen.errors import UsageError
from edgegen.prune.apply import require_modules
from edgegen.prune.recipe import Recipe
from edgegen.students.student import Student


@dataclass(frozen=True)
class PruneOptions:
    """`components`: () for the denoiser and the decoder, or the one that there is. `max_macs`: component (or "" for
    each) -> share of what it has. `max_latency` of the whole picture: a share, or milliseconds with `latency_ms`.
    `ratio`: share of every space that goes. `separable`: component -> the share of its MACs that it is left with by
    making convolutions separable, before anything is cut. `uniform`: one ratio for all spaces, units ranked by their
    weights alone. `samples`: pictures that importance is measured on, of `steps` steps. `recipe`: what `edgegen tune`
    chose, instead of any budget. `slower`: backend -> how many times as long as the student that is cut takes the one
    that a share of `max_latency` is of; 1 where not named."""

    components: tuple[str, ...] = ()
    max_macs: Mapping[str, float] = field(default_factory=dict)
    max_latency: float | None = None
    latency_ms: bool = False
    ratio: float | None = None
    separable: Mapping[str, float] = field(default_factory=dict)
    uniform: bool = False
    depth: bool = True
    samples: int = 8
    steps: int | None = None
    jobs: int = 1
    measure: bool = True
    recipe: Recipe | None = None
    slower: Mapping[str, float] = field(default_factory=dict)


def components_of(student: Student, options: PruneOptions) -> tuple[str, ...]:
    """What is pruned; UsageError for what is not there, is a finished graph, or has a budget and is not pruned."""
    drawn = student.config.sampler is not None
    names = options.components or (("denoiser", "decoder") if drawn else tuple(student.components))
    for name in (*names, *options.separable, *(one for one in options.max_macs if one)):
        if name not in student.components:
            known = ", ".join(f"`{one}`" for one in student.components)
            raise UsageError(f"student `{student.config.name}` has no component `{name}`", hint=f"it has {known}")
        require_modules(name, student.config.components[name].architecture)
    stray = [one for one in options.max_macs if one and one not in names]
    if stray:
        raise UsageError(f"`--max-macs` names `{stray[0]}`, which is not pruned", hint=f"`--component {stray[0]}`")
    return names


def shares_of(options: PruneOptions, names: Sequence[str]) -> dict[str, float]:
    """Component -> the share of its MACs that may be left."""
    given = options.max_macs
    return {name: given.get(name, given.get("", 1.0)) for name in names if name in given or "" in given}
