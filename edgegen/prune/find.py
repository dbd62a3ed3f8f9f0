"""The spaces of a captured component, from how nodes go through its graph (`edgegen.prune.axes`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch.export import ExportedProgram

from edgegen.prune.axes import Axes
from edgegen.prune.axes_rules import RULES
from edgegen.prune.labels import STAYS, Dimension
from edgegen.prune.space import Cut, Kind, Space, Spaces

Units = npt.NDArray[np.int32]
UNREAD, UNWRITTEN = "no product reads it", "it comes from outside the component, or is a constant"


@dataclass
class Found:
    """What `spaces` knows beside the spaces: the graph's labels, and the unit of each node in them."""

    axes: Axes
    units: Units
    """[nodes]"""
    spaces: Spaces
    places: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Unit -> its space, and which one of it."""


def spaces(program: ExportedProgram) -> Spaces:
    """What may be cut out of a captured component, and what may not and why. The graph must be as captured: rewrites
    move weights away from the modules that hold them."""
    return find(program).spaces


def find(program: ExportedProgram) -> Found:
    """`spaces` with what they were found by."""
    axes = Axes(program, RULES)
    units, reasons = axes.ledger.close()
    dimensions = axes.ledger.dimensions
    holders: dict[int, list[int]] = {}
    """Unit -> the dimensions that hold it."""
    for index, one in enumerate(dimensions):
        for unit in np.unique(units[one.start : one.start + one.size]).tolist():
            holders.setdefault(unit, []).append(index)
    members: dict[tuple[tuple[int, ...], bool], list[int]] = {}
    for unit, those in holders.items():
        members.setdefault((tuple(those), unit in reasons), []).append(unit)
    heads = {unit for nodes in axes.ledger.heads for unit in units[nodes[nodes != STAYS].numpy()].tolist()}
    found = Found(axes, units, Spaces((), (), dict(axes.sizes)))
    free: list[Space] = []
    frozen: list[Space] = []
    names: set[str] = set()
    for (at, is_frozen), some in sorted(members.items(), key=lambda item: item[0][0]):
        there = [dimensions[index] for index in at]
        if not any(one.reads or one.writes for one in there) or (is_frozen and len(some) == 1):
            continue
        order = _ordered(some, next((one for one in there if one.writes), there[0]), units)
        space = _space(there, order, units, bool(set(some) & heads), axes.sizes, names)
        reason = next((reasons[unit] for unit in some if unit in reasons), None)
        if not space.writes or not space.reads:
            reason = UNWRITTEN if not space.writes else reason or UNREAD
        groups, problem = _groups(axes, units, order) if reason is None else (1, None)
        space = _replaced(space, groups, reason if reason is not None else problem)
        (free if space.frozen is None else frozen).append(space)
        found.places.update({unit: (space.name, index) for index, unit in enumerate(order)})
    found.spaces = Spaces(tuple(free), tuple(one for one in frozen if one.frozen), dict(axes.sizes))
    return found


def _replaced(space: Space, groups: int, frozen: str | None) -> Space:
    return Space(space.name, space.kind, space.count, space.cuts, space.reads, space.writes, groups, frozen)


def _ordered(some: Sequence[int], first: Dimension, units: Units) -> list[int]:
    """Units as they lie in a dimension."""
    inside = units[first.start : first.start + first.size]
    found, starts = np.unique(inside, return_index=True)
    wanted = set(some)
    return [unit for _, unit in sorted(zip(starts.tolist(), found.tolist(), strict=True)) if unit in wanted]


def _space(
    there: Sequence[Dimension],
    order: Sequence[int],
    units: Units,
    heads: bool,
    sizes: Mapping[str, tuple[int, ...]],
    names: set[str],
) -> Space:
    places = {unit: index for index, unit in enumerate(order)}
    cuts, reads, writes = [], [], []
    several = False
    """Whether a unit has several positions in a dimension that a product writes: the halves of a gated feed-forward."""
    for one in there:
        inside = units[one.start : one.start + one.size]
        owners = np.array([places.get(unit, -1) for unit in inside.tolist()], dtype=np.int32)
        cut = Cut(one.name, one.dim, owners)
        cuts.append(cut)
        if one.reads:
            reads.append(cut)
        if one.writes:
            writes.append(cut)
            several = several or int((owners >= 0).sum()) > len(order)
    inner = (
        len(reads) == 1
        and all(one.reads or one.writes for one in there)
        and max(len(sizes[one.name]) for one in there) == 2
    )
    kind: Kind = "heads" if heads else "ffn" if several or inner else "channels"
    first = next((one for one in there if one.writes), there[0]).name.rpartition(".")[0] or there[0].name
    if heads:
        first = first.rpartition(".")[0] or first
    name, number = first, 1
    while name in names:
        number += 1
        name = f"{first}#{number}"
    names.add(name)
    return Space(name, kind, len(order), tuple(cuts), tuple(reads), tuple(writes))


def _groups(axes: Axes, units: Units, order: Sequence[int]) -> tuple[int, str | None]:
    """Into how many equal runs norms split the units, or why they may not be cut."""
    places = {unit: index for index, unit in enumerate(order)}
    groups = 1
    for nodes, number in axes.ledger.norms:
        inside = [places.get(unit, -1) for unit in units[nodes[nodes != STAYS].numpy()].tolist()]
        if len(inside) < len(nodes) or -1 in inside:
            # Beside other channels the norm's groups are made anew (`edgegen.students.reduce.norm_groups`).
            continue
        rows = np.array(inside).reshape(number, -1)
        counts = np.stack([np.bincount(row, minlength=len(order)) for row in rows])
        if (counts == counts[0]).all():
            continue
        runs = [np.unique(row) for row in rows]
        each = len(runs[0])
        aligned = all(len(run) == each and run[0] % each == 0 and run[-1] - run[0] == each - 1 for run in runs)
        if not aligned or len(order) % each:
            return 1, f"the groups of a norm ({number}) lie across its units"
        groups = int(np.lcm(groups, len(order) // each))
    if len(order) % groups:
        return 1, f"norms of different groups ({groups} together) do not divide its {len(order)} units"
    return groups, None
