"""Pruning by one ratio: the same share of every space goes, whatever it costs or loses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgegen.errors import GateError, UsageError
from edgegen.graph.capture import capture
from edgegen.graph.count import count
from edgegen.prune.apply import pruned
from edgegen.prune.levels import keep
from edgegen.prune.space import Space, Spaces, to_pruning
from edgegen.students.pruning import Pruning
from edgegen.students.student import Student

STEPS = 12
"""Halvings of the interval in which a ratio is looked for: it is known to a four-thousandth."""


def by_ratio(
    spaces: Spaces, scores: Mapping[str, Sequence[float]], ratio: float, multiple: int = 1
) -> dict[str, tuple[int, ...]]:
    """The units that stay of each space when a share `ratio` of it goes, those of the highest scores, rounded to what
    norms can have and, where anything can, to dimensions that are multiples of `multiple`. UsageError for a ratio that
    would leave nothing of a space."""
    if not 0 < ratio < 1:
        raise UsageError(f"ratio {ratio:g} is not between 0 and 1", hint="`--ratio 0.5` takes half of every space")
    return {space.name: keep(space, scores[space.name], _left(space, ratio, multiple)) for space in spaces.spaces}


def _left(space: Space, ratio: float, multiple: int) -> int:
    wanted = (1 - ratio) * space.count
    if wanted < 0.5:
        raise UsageError(
            f"a ratio of {ratio:g} leaves nothing of `{space.name}`, which has {space.count} units",
            hint=f"`--ratio {_most(space):g}` at most, or a budget (`--max-macs`), which cuts what can be spared",
        )
    positions = max((int((cut.owners >= 0).sum()) // space.count for cut in space.cuts), default=1)
    near = [one for one in space.counts if one * positions % multiple == 0] or list(space.counts)
    return min(near, key=lambda one: (abs(one - wanted), one))


def _most(space: Space) -> float:
    """The largest ratio, in hundredths, that leaves a unit."""
    return math.floor(100 * (1 - 1 / max(2, space.count))) / 100


def macs(student: Student, component: str) -> int:
    """Of one call, counted in the captured graph."""
    return count(capture(student.components[component])).macs


def ratio_for(
    student: Student,
    component: str,
    spaces: Spaces,
    scores: Mapping[str, Sequence[float]],
    most: float,
    multiple: int = 1,
) -> Pruning:
    """The record of the smallest ratio at which the MACs of `component` are at most `most`; GateError where none is."""
    low, high = 0.0, min(_most(space) for space in spaces.spaces)
    found: Pruning | None = None
    least = 0
    for step in range(STEPS + 1):
        ratio = high if step == 0 else (low + high) / 2
        pruning = to_pruning(spaces, by_ratio(spaces, scores, ratio, multiple))
        made = macs(pruned(student, {component: pruning}), component)
        if step == 0:
            least = made
        if made <= most:
            found, high = pruning, ratio
        elif step == 0:
            break
        else:
            low = ratio
    if found is None:
        raise GateError(
            f"no ratio takes `{component}` to {most:,.0f} MACs: at the highest it still has {least:,}",
            hint=f"ask for {least:,} or more, or leave `--uniform` out",
        )
    return found
