"""Palettes: tables of 2^bits values and a place in one for each weight, by k-means along a line.

On a line the members of a cluster lie side by side, so Lloyd's algorithm (1982) needs sorted values and running sums,
not distances: a turn costs a few searches a cluster, whatever the number of weights. Nothing is random: clusters start
where Panter and Dite (1951) put levels of least squared error, as many as the cube root of the density.
"""

from __future__ import annotations

import torch
from torch import Tensor

TURNS = 60
TURNS_AFTER_MOVE = 4
MOVES = 32
SORTED_UP_TO = 1 << 17
"""Rows of more values are not sorted but counted, by the first bits of their float32."""
_KEY_BITS = 18
_CELLS = 2048
_CHUNK = 1 << 19
"""Elements; what is made of so many stays in the cache."""


def palettes(rows: Tensor, size: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of each row of [T, M]: a sorted table, [T, size] float32, and places in it, [T, M] uint8.

    `importance` [T, M] weighs squared errors. Table values are such that the dtype of `rows` holds them. A row of at
    most `size` distinct values keeps them exactly; a table of fewer is filled up with its last.
    """
    if rows.shape[1] <= SORTED_UP_TO:
        tables = _sorted_tables(rows.float(), size, importance)
    else:
        each = [None] * len(rows) if importance is None else list(importance)
        tables = torch.cat([_counted_table(row.float(), size, one) for row, one in zip(rows, each, strict=True)])
    tables = tables.to(rows.dtype).float()
    codes = torch.stack([_places(row.float(), table) for row, table in zip(rows, tables, strict=True)])
    return _compacted(tables, codes)


def _places(row: Tensor, table: Tensor) -> Tensor:
    """Of each value, the place of the nearest entry of a sorted table; of two equal ones the first."""
    entries, first = torch.unique(table, return_inverse=True)
    middles = (entries[1:].double() + entries[:-1].double()) / 2
    start = torch.full((len(entries),), len(table), dtype=torch.int32)
    start.scatter_reduce_(0, first, torch.arange(len(table), dtype=torch.int32), "amin")
    codes = torch.empty(row.shape, dtype=torch.uint8)
    for part, place in zip(torch.split(row, _CHUNK), torch.split(codes, _CHUNK), strict=True):
        place.copy_(start[torch.bucketize(part, middles.float(), out_int32=True)])
    return codes


def _compacted(tables: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Entries that no weight uses go, so that decoded weights are encoded to this very table."""
    for index, (table, places) in enumerate(zip(tables, codes, strict=True)):
        used = torch.bincount(places.int(), minlength=len(table)) > 0
        count = int(used.sum())
        if count == len(table):
            continue
        kept = table[used]
        tables[index] = torch.cat([kept, kept[-1:].expand(len(table) - count)])
        codes[index] = (used.cumsum(0) - 1).to(torch.uint8)[places.int()]
    return tables, codes


def _sorted_tables(rows: Tensor, size: int, importance: Tensor | None) -> Tensor:
    values, order = rows.sort(dim=1)
    masses = torch.ones_like(values, dtype=torch.float64)
    if importance is not None:
        masses = torch.gather(importance.double(), 1, order)
    tables = _lloyd(values.double(), masses, size)
    fresh = torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), values[:, 1:] > values[:, :-1]], 1)
    for index in (fresh.sum(1) <= size).nonzero()[:, 0].tolist():
        tables[index] = _filled(values[index][fresh[index]], size)
    return tables


def _counted_table(row: Tensor, size: int, importance: Tensor | None) -> Tensor:
    """[1, size]: weights that share sign, exponent and the first bits of mantissa are one point, at their mean."""
    masses, sums = torch.zeros(1 << _KEY_BITS, dtype=torch.float64), torch.zeros(1 << _KEY_BITS, dtype=torch.float64)
    one, pure = torch.zeros(1 << _KEY_BITS), True
    there = torch.zeros(1 << _KEY_BITS, dtype=torch.bool)
    for start in range(0, len(row), _CHUNK):
        part = row[start : start + _CHUNK]
        key, each = _keys(part), torch.ones(len(part), dtype=torch.float64)
        if importance is not None:
            each = importance[start : start + _CHUNK].double()
        masses += torch.bincount(key, each, minlength=1 << _KEY_BITS)
        sums += torch.bincount(key, each * part, minlength=1 << _KEY_BITS)
        one[key[~there[key]]] = part[~there[key]]
        there[key] = True
        pure = pure and bool((one[key] == part).all())
    if pure and int(there.sum()) <= size:
        return _filled(one[there].sort().values, size)[None]
    there &= masses > 0
    points, order = (sums[there] / masses[there]).sort()
    return _lloyd(points[None], masses[there][order][None], size)


def _keys(values: Tensor) -> Tensor:
    """int64 of the first bits of float32 `values`."""
    return (values.contiguous().view(torch.int32) >> (32 - _KEY_BITS)).long() + (1 << (_KEY_BITS - 1))


def _filled(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values[-1:].expand(size - len(values))])


def _lloyd(points: Tensor, masses: Tensor, size: int) -> Tensor:
    """[T, size] float32 of sorted `points` and their `masses`, [T, P] float64."""
    clusters = _Clusters(points, masses)
    centres = clusters.settled(_start(points, clusters.mass, size), TURNS)
    for _ in range(min(size, MOVES) if size > 2 else 0):
        moved = clusters.moved(centres)
        if torch.equal(moved, centres):
            break
        centres = clusters.settled(moved, TURNS_AFTER_MOVE)
    return clusters.settled(centres, TURNS).float()


class _Clusters:
    """Sorted points with running sums of their masses and moments, [T, P + 1]."""

    def __init__(self, points: Tensor, masses: Tensor) -> None:
        zero = torch.zeros(len(points), 1, dtype=torch.float64)
        self._points = points.contiguous()
        self.mass = torch.cat([zero, masses.cumsum(1)], 1)
        self._moment = torch.cat([zero, (points * masses).cumsum(1)], 1)

    def settled(self, centres: Tensor, turns: int) -> Tensor:
        """Lloyd's algorithm from `centres`, sorted."""
        for _ in range(turns):
            weight, means = self._sums(self._ends(centres))
            moved = torch.where(weight > 0, means, centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        return centres

    def moved(self, centres: Tensor) -> Tensor:
        """In each row where that is better: two neighbours as one, and for it another cluster as two.

        Lloyd's algorithm moves clusters to where they are wanted only step by step, and stops before.
        """
        ends = self._ends(centres)
        weight, means = self._sums(ends)
        halves = torch.searchsorted(self._points, centres.contiguous())
        halves = halves.clamp(ends[:, :-1], ends[:, 1:])
        left, low = self._sums(torch.stack([ends[:, :-1], halves], 2).flatten(1))
        left, low = left[:, ::2], low[:, ::2]
        right = weight - left
        high = (weight * means - left * low) / right
        gain = _apart(left, low, right, high)
        place = gain.argmax(1)
        cost = _apart(weight[:, :-1], means[:, :-1], weight[:, 1:], means[:, 1:])
        rows = torch.arange(len(centres))
        for neighbour in (place - 1, place):
            cost[rows, neighbour.clamp(0, cost.shape[1] - 1)] = torch.inf
        pair = cost.argmin(1)
        better = gain[rows, place] > cost[rows, pair]
        new = centres.clone()
        both = weight[rows, pair] + weight[rows, pair + 1]
        middle = (weight * torch.where(weight > 0, means, 0.0)).unfold(1, 2, 1).sum(2)[rows, pair] / both
        new[rows, pair] = torch.where(both > 0, middle, centres[rows, pair])
        new[rows, pair + 1], new[rows, place] = low[rows, place], high[rows, place]
        return torch.where(better[:, None], new.sort(1).values, centres)

    def _ends(self, centres: Tensor) -> Tensor:
        ends = torch.searchsorted(self._points, ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous())
        return torch.cat([torch.zeros_like(ends[:, :1]), ends, torch.full_like(ends[:, :1], self._points.shape[1])], 1)

    def _sums(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Mass and mean of what lies between each end and the next; a mean of nothing is NaN."""
        weight = torch.gather(self.mass, 1, ends).diff(dim=1)
        return weight, torch.gather(self._moment, 1, ends).diff(dim=1) / weight


def _apart(weight: Tensor, mean: Tensor, other_weight: Tensor, other_mean: Tensor) -> Tensor:
    """How much squared error it saves to keep two sets of points apart; nothing when one is empty."""
    saved = weight * other_weight / (weight + other_weight) * (mean - other_mean).square()
    return saved.nan_to_num(0.0, 0.0, 0.0)


def _start(points: Tensor, mass: Tensor, size: int) -> Tensor:
    """Levels as dense as the cube root of the mass, read off cells of equal mass."""
    cells = min(_CELLS, max(2 * size, points.shape[1] // 8))
    shares = torch.linspace(0, 1, cells + 1, dtype=torch.float64) * mass[:, -1:]
    ends = torch.searchsorted(mass[:, 1:].contiguous(), shares.contiguous()).clamp(max=points.shape[1] - 1)
    edges = torch.gather(points, 1, ends)
    levels = torch.cat([torch.zeros(len(points), 1, dtype=torch.float64), edges.diff(dim=1).pow(2 / 3).cumsum(1)], 1)
    wanted = (torch.arange(size, dtype=torch.float64) + 0.5) / size * levels[:, -1:]
    right = torch.searchsorted(levels, wanted.contiguous()).clamp(1, cells)
    below, above = torch.gather(levels, 1, right - 1), torch.gather(levels, 1, right)
    share = ((wanted - below) / (above - below)).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    left = torch.gather(edges, 1, right - 1)
    return left + share * (torch.gather(edges, 1, right) - left)
