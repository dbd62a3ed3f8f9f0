"""What was cut out of a network, as plain data; `edgegen.students.reduce` makes a module smaller by it. No torch here.

A pruned student's config describes the network it came from, and its record says which positions of which parameters
are left and which modules are passed by. So nothing is ever unpickled, and every number can be checked before memory is
spent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from edgegen.errors import EdgegenError

PRUNE_HINT = "prune the student again from the one that it came from: `edgegen prune --help`"
_RANGES = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*")
MAX_RANK = 64
"""Of a convolution within each channel: filters of 8x8 have no more."""
MAX_TEXT = 1 << 20
"""Letters of one list of positions: those of a dimension a hundred thousand long, none beside another."""

Way = Literal["identity", "zero"]
"""How a removed module is passed by: with its first input, or with zeros like it (a branch that is added)."""


class Pruning(BaseModel):
    """What is left of the network that `architecture` and `config` describe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kept: tuple[str, ...] = ()
    """Lists of positions in ascending order, as `0-3,8,10-11`; parameters share them."""
    cuts: dict[str, dict[int, int]] = {}
    """Parameter or buffer, or a size of a norm without weights (`norm1.normalized_shape`) -> dimension -> index into
    `kept`. What is not named stays whole."""
    removed: dict[str, Way] = {}
    """Path of a module -> how it is passed by."""
    separated: dict[str, int] = {}
    """Path of a convolution -> filters for each channel of the depthwise one that stands, with a pointwise one after
    it, in its place. `cuts` are of those two."""

    @field_validator("kept")
    @classmethod
    def _ascending(cls, kept: tuple[str, ...]) -> tuple[str, ...]:
        for text in kept:
            if len(text) > MAX_TEXT or _RANGES.fullmatch(text) is None:
                raise ValueError(f"`{text[:40]}` is not a list of positions as `0-3,8,10-11`")
            runs = list(ranges(text))
            ordered = all(first <= last for first, last in runs)
            if not ordered or any(one[1] >= other[0] for one, other in pairwise(runs)):
                raise ValueError(f"positions `{text[:40]}` are not in ascending order")
        return kept

    @model_validator(mode="after")
    def _within(self) -> Pruning:
        for name, dims in self.cuts.items():
            for dim, index in dims.items():
                if dim < 0 or not 0 <= index < len(self.kept):
                    raise ValueError(
                        f"the cut of `{name[:80]}` in dimension {dim} names list {index}, which is not there"
                    )
        return self

    @field_validator("separated")
    @classmethod
    def _ranks(cls, separated: dict[str, int]) -> dict[str, int]:
        for path, rank in separated.items():
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"`{path[:80]}` is separated into {rank} filters a channel, not 1 to {MAX_RANK}")
        return separated

    @model_serializer(mode="wrap")
    def _without_separated(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # As before there were any: its bytes are in hashes.
        data: dict[str, Any] = handler(self)
        if not self.separated:
            del data["separated"]
        return data

    @classmethod
    def of(
        cls,
        cuts: Mapping[str, Mapping[int, Sequence[int]]],
        removed: Mapping[str, Way] | None = None,
        separated: Mapping[str, int] | None = None,
    ) -> Pruning:
        """From ascending positions of each dimension that is cut; equal ones are kept once."""
        kept: dict[str, int] = {}
        made = {
            name: {dim: kept.setdefault(written(positions), len(kept)) for dim, positions in dims.items()}
            for name, dims in cuts.items()
            if dims
        }
        return cls(kept=tuple(kept), cuts=made, removed=dict(removed or {}), separated=dict(separated or {}))

    def positions(self, name: str, dim: int) -> tuple[int, ...] | None:
        """Ascending; None where that dimension is whole."""
        index = self.cuts.get(name, {}).get(dim)
        return None if index is None else read(self.kept[index])

    def then(self, other: Pruning) -> Pruning:
        """This, and then `other`, whose positions are those of the network that this one leaves."""
        twice = [path for path in other.separated if path in self.separated]
        if twice:
            raise EdgegenError(f"pruning separates `{twice[0]}`, which is separated already", PRUNE_HINT)
        first_ = self.separating(other.separated)
        removed = {**self.removed, **other.removed}
        # A block that goes takes with it what was removed within it before.
        removed = {
            path: way for path, way in removed.items() if not path.startswith(tuple(f"{one}." for one in removed))
        }
        gone = tuple(f"{path}." for path in removed)
        separated = {
            path: rank
            for path, rank in {**self.separated, **other.separated}.items()
            if not f"{path}.".startswith(gone)
        }
        cuts: dict[str, dict[int, Sequence[int]]] = {}
        for name in [*first_.cuts, *(name for name in other.cuts if name not in first_.cuts)]:
            if name.startswith(gone):
                continue
            dims = sorted({*first_.cuts.get(name, {}), *other.cuts.get(name, {})})
            for dim in dims:
                first, second = first_.positions(name, dim), other.positions(name, dim)
                if first is not None and second is not None:
                    if second[-1] >= len(first):
                        raise EdgegenError(
                            f"pruning keeps position {second[-1]} of `{name}`, which has {len(first)}", PRUNE_HINT
                        )
                    first = tuple(first[i] for i in second)
                kept = second if first is None else first
                assert kept is not None
                cuts.setdefault(name, {})[dim] = kept
        return Pruning.of(cuts, removed, separated)

    def separating(self, ranks: Mapping[str, int]) -> Pruning:
        """The same cuts where convolutions at `ranks` are two: outputs are the pointwise one's, inputs the channels
        of the depthwise one."""
        cuts: dict[str, dict[int, Sequence[int]]] = {}
        for name, dims in self.cuts.items():
            path, _, attribute = name.rpartition(".")
            for dim in dims:
                kept = self.positions(name, dim)
                assert kept is not None
                rank = ranks.get(path)
                if rank is None:
                    cuts.setdefault(name, {})[dim] = kept
                elif dim == 0:
                    cuts.setdefault(f"{path}.pointwise.{attribute}", {})[0] = kept
                else:
                    filters = [position * rank + one for position in kept for one in range(rank)]
                    cuts.setdefault(f"{path}.depthwise.weight", {})[0] = filters
                    cuts.setdefault(f"{path}.pointwise.weight", {})[1] = filters
        return Pruning.of(cuts, self.removed, self.separated)


def written(values: Sequence[int]) -> str:
    """Ascending positions as `0-3,8,10-11`."""
    starts = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1] + 1), len(values)]
    runs = ((values[start], values[end - 1]) for start, end in pairwise(starts))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def ranges(text: str) -> Iterator[tuple[int, int]]:
    """First and last of each run."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield int(first), int(last or first)


def count(text: str) -> int:
    """How many positions `text` lists, without listing them."""
    return sum(last - first + 1 for first, last in ranges(text))


def read(text: str) -> tuple[int, ...]:
    """The positions; `count` says beforehand how many they are."""
    return tuple(position for first, last in ranges(text) for position in range(first, last + 1))
