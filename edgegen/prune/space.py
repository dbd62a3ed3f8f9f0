"""What may be cut out of a network together: spaces of units.

A unit goes whole or stays: a channel through all norms, skips and concatenations that it passes, a head, an inner unit
of a feed-forward. A space is a set of units that the same dimensions of the same parameters hold, one beside another.
`edgegen.prune.axes` finds them; a selection says which units of which spaces stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgegen.errors import EdgegenError, UsageError
from edgegen.students.pruning import Pruning, Way

Owners = npt.NDArray[np.int32]
Kind = Literal["channels", "heads", "ffn"]
Selection = Mapping[str, Sequence[int]]
"""Space -> the units that stay, ascending; a space that is not named stays whole."""


class Cut(NamedTuple):
    """One dimension of a parameter or buffer, or of a norm without weights (`norm1.normalized_shape`)."""

    parameter: str
    dim: int
    owners: Owners
    """[size of the dimension]: the unit that a position belongs to, -1 where it is none of this space."""


class Slice(NamedTuple):
    """Positions of one dimension of one parameter."""

    parameter: str
    dim: int
    positions: tuple[int, ...]


class Unit(NamedTuple):
    """`reads`: weights by which what follows reads this unit. `writes`: weights and biases that make it."""

    slices: tuple[Slice, ...]
    reads: tuple[Slice, ...]
    writes: tuple[Slice, ...]


@dataclass(frozen=True)
class Space:
    """`count` units, and every dimension that holds any of them.

    `groups`: a norm splits the units, in order, into so many equal runs; equally many of each run stay, or none.
    `frozen`: why nothing of it may go, None where it may.
    """

    name: str
    kind: Kind
    count: int
    cuts: tuple[Cut, ...]
    reads: tuple[Cut, ...]
    """Those of `cuts` by which consumers read: the inner dimension of a product's weight."""
    writes: tuple[Cut, ...]
    """Those by which producers write: the outer dimension of a product's weight, and its bias."""
    groups: int = 1
    frozen: str | None = None

    def unit(self, index: int) -> Unit:
        def slices(cuts: tuple[Cut, ...]) -> tuple[Slice, ...]:
            found = ((cut, np.flatnonzero(cut.owners == index)) for cut in cuts)
            return tuple(Slice(cut.parameter, cut.dim, tuple(at.tolist())) for cut, at in found if len(at))

        return Unit(slices(self.cuts), slices(self.reads), slices(self.writes))

    @property
    def units(self) -> Iterator[Unit]:
        return (self.unit(index) for index in range(self.count))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many units may stay, ascending: any number, or with groups so many groups of so many."""
        if self.frozen is not None:
            return (self.count,)
        each = self.count // self.groups
        return tuple(sorted({g * n for g in range(1, self.groups + 1) for n in range(1, each + 1)}))

    def check(self, kept: Sequence[int]) -> None:
        """UsageError for units that cannot be what is left of this space."""
        if not kept:
            raise UsageError(f"nothing would be left of `{self.name}`", hint="keep at least one unit of every space")
        if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.count:
            raise UsageError(f"units kept of `{self.name}` must ascend within 0..{self.count - 1}")
        if len(kept) == self.count:
            return
        if self.frozen is not None:
            raise UsageError(f"`{self.name}` cannot be cut: {self.frozen}")
        each = np.bincount(np.asarray(kept) // (self.count // self.groups), minlength=self.groups)
        if len(set(each[each > 0].tolist())) != 1:
            raise UsageError(
                f"units kept of `{self.name}` leave its norm groups of different sizes",
                hint=f"keep equally many of each of its {self.groups} runs, or none of a run",
            )


@dataclass(frozen=True)
class Spaces:
    """Of one component. `spaces` may be cut; `frozen` may not, each with its reason."""

    spaces: tuple[Space, ...]
    frozen: tuple[Space, ...] = ()
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of everything that cuts name."""

    def __getitem__(self, name: str) -> Space:
        for space in (*self.spaces, *self.frozen):
            if space.name == name:
                return space
        raise EdgegenError(f"there is no space `{name}` to prune", hint="`edgegen prune MODEL --target T` lists them")


def to_pruning(spaces: Spaces, selection: Selection, removed: Mapping[str, Way] | None = None) -> Pruning:
    """The record of what is left: units that are not selected are cut, and `removed` modules passed by.

    UsageError for a selection that a space cannot have. Spaces must have been found in the network as it is before
    anything is removed; what lies within removed modules is cut no more.
    """
    gone = tuple(f"{path}." for path in removed or {})
    masks: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
    for name, kept in selection.items():
        space = spaces[name]
        space.check(kept)
        if len(kept) == space.count:
            continue
        stays = np.zeros(space.count + 1, dtype=bool)
        stays[list(kept)] = True
        stays[-1] = True  # what is none of this space's
        for cut in space.cuts:
            if not cut.parameter.startswith(gone):
                mask = masks.setdefault((cut.parameter, cut.dim), np.ones(len(cut.owners), dtype=bool))
                mask &= stays[cut.owners]
    cuts: dict[str, dict[int, Sequence[int]]] = {}
    for (parameter, dim), mask in masks.items():
        cuts.setdefault(parameter, {})[dim] = np.flatnonzero(mask).tolist()
    return Pruning.of(cuts, removed)
