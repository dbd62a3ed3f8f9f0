"""The sizes that a space may be cut to, and which units stay at each: those that matter most.

Sizes are shares of the whole, rounded to what the target's kernels compute without waste (`Delegate.widths`) and to
what norms with groups can have. Levels are nested: what a small one keeps, every larger one keeps too, unless a
norm's groups forbid it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgegen.errors import UsageError
from edgegen.prune.space import Space

SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


def keep(space: Space, scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` units of the highest scores that `space` may be left with, ascending; UsageError for a count that it
    cannot have. Of the ways to split a count over a norm's groups the one with the highest sum."""
    if count not in space.counts:
        near = min(space.counts, key=lambda one: abs(one - count))
        raise UsageError(
            f"`{space.name}` cannot be left with {count} of its {space.count} units", hint=f"it can have {near}"
        )
    values = np.asarray(scores, dtype=np.float64).reshape(space.groups, -1)
    each = values.shape[1]
    order = np.argsort(-values, axis=1, kind="stable")
    best: tuple[float, list[int]] | None = None
    for groups in range(1, space.groups + 1):
        if count % groups or count // groups > each:
            continue
        few = count // groups
        sums = np.take_along_axis(values, order[:, :few], axis=1).sum(1)
        chosen = np.argsort(-sums, kind="stable")[:groups]
        kept = sorted(int(group) * each + int(unit) for group in chosen for unit in order[group, :few])
        found = float(sums[chosen].sum())
        if best is None or found > best[0]:
            best = (found, kept)
    assert best is not None
    return tuple(best[1])


def sizes(space: Space, multiple: int = 1, shares: Sequence[float] = SHARES) -> tuple[int, ...]:
    """Counts of units, falling, the whole first: near `shares` of it and with dimensions that are multiples of
    `multiple`, where any legal count has such."""
    positions = max((int((cut.owners >= 0).sum()) // space.count for cut in space.cuts), default=1)
    legal = [count for count in space.counts if count * positions % multiple == 0] or list(space.counts)
    wanted = {min(legal, key=lambda one: (abs(one - share * space.count), one)) for share in shares if share < 1}
    return (space.count, *sorted((one for one in wanted if one < space.count), reverse=True))


def ladder(
    space: Space, scores: Sequence[float], multiple: int = 1, shares: Sequence[float] = SHARES
) -> tuple[tuple[int, ...], ...]:
    """The units that stay at each level; the first level keeps all."""
    return tuple(keep(space, scores, count) for count in sizes(space, multiple, shares))
