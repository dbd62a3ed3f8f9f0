"""Dense convolutions made depthwise-separable: which ones, and with how many filters for each channel.

Every convolution wider than 1x1 may stay as it is or become a depthwise and a pointwise one
(`edgegen.students.networks.separable_conv`) of a few ranks. What each choice alone does to the picture is measured, and
what loses least within the MACs that are asked for is chosen exactly, as if losses added up. The first convolution of a
network and the last stay: they cost little, and everything goes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.optimize
from torch import nn

from edgegen.errors import GateError, UsageError
from edgegen.graph.capture import capture
from edgegen.graph.count import count
from edgegen.prune.apply import pruned
from edgegen.prune.cost import ops
from edgegen.prune.space import Spaces
from edgegen.prune.trial import Trial
from edgegen.students.networks.separable_conv import dense_macs, separable, separable_macs
from edgegen.students.pruning import Pruning
from edgegen.students.student import Component, Student

RANKS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Separation:
    """Ways to write one convolution. `macs` and `losses`: dense first, then of each of `ranks`."""

    path: str
    ranks: tuple[int, ...]
    macs: tuple[int, ...]
    losses: tuple[float, ...] = ()


def separations(part: Component) -> tuple[Separation, ...]:
    """What may become separable in a component and saves MACs there, in the order of the network, without losses."""
    convs = [(path, one) for path, one in part.module.named_modules() if isinstance(one, nn.Conv2d)]
    held: dict[str, int] = {}
    for op in ops(capture(part), Spaces((), (), {})):
        held[op.path] = held.get(op.path, 0) + op.macs
    found = []
    for path, conv in convs[1:-1]:
        if separable(conv) is not None or not held.get(path):
            continue
        positions = held[path] // dense_macs(conv)
        ranks = tuple(rank for rank in RANKS if separable_macs(conv, rank) < dense_macs(conv))
        if ranks:
            found.append(Separation(path, ranks, (held[path], *(positions * separable_macs(conv, r) for r in ranks))))
    return tuple(found)


def measured(
    trial: Trial, component: str, found: Sequence[Separation], advance: Callable[[], None] = lambda: None
) -> tuple[Separation, ...]:
    """`found` with what each does to the pictures of `trial` alone; never less than one of more filters."""
    made = []
    for one in found:
        losses = []
        for rank in one.ranks:
            other = pruned(trial.student, {component: Pruning(separated={one.path: rank})})
            losses.append(trial.loss(other))
            advance()
        never_less = np.maximum.accumulate(losses[::-1])[::-1]
        made.append(Separation(one.path, one.ranks, one.macs, (0.0, *(float(each) for each in never_less))))
    return tuple(made)


def choose(found: Sequence[Separation], save: float) -> dict[str, int]:
    """Convolution -> rank: what saves at least `save` MACs at the smallest sum of losses, solved exactly (HiGHS);
    GateError where all of them together do not save that much."""
    most = sum(one.macs[0] - min(one.macs) for one in found)
    if save > most:
        raise GateError(f"separable convolutions save {most:,} MACs at most, and {save:,.0f} were asked for")
    if save <= 0:
        return {}
    losses = np.array([loss for one in found for loss in one.losses])
    macs = np.array([value for one in found for value in one.macs], dtype=np.float64)
    starts = np.cumsum([0, *(len(one.losses) for one in found)])
    once = np.zeros((len(found), len(losses)))
    for row, (first, last) in enumerate(pairwise(starts)):
        once[row, first:last] = 1
    unit = max(1.0, float(macs.sum()) / len(macs))
    whole = sum(one.macs[0] for one in found)
    answer = scipy.optimize.milp(
        losses / max(1e-30, float(losses.max())) + 1e-9 * macs / macs.max(),
        constraints=[
            scipy.optimize.LinearConstraint(once, 1, 1),
            scipy.optimize.LinearConstraint(macs[None] / unit, -np.inf, (whole - save) / unit),
        ],
        integrality=np.ones(len(losses), dtype=np.int64),
        bounds=scipy.optimize.Bounds(0, 1),
    )
    if answer.x is None:
        raise GateError(f"no choice of separable convolutions saves {save:,.0f} MACs: {answer.message}")
    chosen = {}
    for row, one in enumerate(found):
        place = int(np.argmax(answer.x[starts[row] : starts[row + 1]]))
        if place:
            chosen[one.path] = one.ranks[place - 1]
    return chosen


def separate(
    student: Student,
    shares: Mapping[str, float],
    trial: Trial,
    stage: Callable[[str, int], None] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Pruning]:
    """Component -> the record that leaves it at most so large a share of its MACs. UsageError for a component of which
    nothing can be separable, GateError for a share that it does not reach."""
    made = {}
    for name, share in shares.items():
        part = student.components[name]
        found = separations(part)
        if not found:
            raise UsageError(
                f"nothing of component `{name}` can be made separable: it has no dense convolution wider than 1x1 "
                "between its first and its last",
                hint="leave `--separable` out",
            )
        if stage is not None:
            stage(f"measure separable convolutions of the {name}", sum(len(one.ranks) for one in found))
        known = measured(trial, name, found, advance)
        whole = count(capture(part)).macs
        least = 1 - sum(one.macs[0] - min(one.macs) for one in known) / whole
        if share < least:
            raise GateError(
                f"separable convolutions leave {least:.1%} of the {name}'s MACs at best, and {share:.1%} was asked for",
                hint=f"cut channels as well: `--separable {name}={least + 0.05:.0%} --max-macs {name}={share:.0%}`",
            )
        made[name] = Pruning(separated=choose(known, (1 - share) * whole))
    return made
