"""Which positions of an activation go when a unit of the network goes.

A node is one position of one dimension of one parameter, numbered from 0. An activation carries layers of nodes: in a
layer, each element has the node whose removal takes it away. So whatever only moves elements (view, permute, slice,
concatenation) is done to layers as it is done to values, and the ledger notes which nodes must go together, and which
may not go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

STAYS = -1
"""In the place of a node, where an element never goes."""


@dataclass(frozen=True)
class Labels:
    """Of a tensor of `shape`. Each layer (int64) is as large as it where nodes vary, and 1 where they do not: a layer
    that varies along one dimension says which positions of it go with what; along several, the tensor was split from
    one dimension, and which of them is cut is not settled yet."""

    shape: tuple[int, ...]
    layers: tuple[Tensor, ...] = ()

    def along(self, dim: int) -> Tensor | None:
        """Nodes [size] of the layer that varies along `dim` alone; None where nothing of that dimension goes."""
        dim %= max(1, len(self.shape))
        return next((layer.flatten() for layer in self.layers if varying(layer) == (dim,)), None)


def varying(layer: Tensor) -> tuple[int, ...]:
    return tuple(dim for dim, size in enumerate(layer.shape) if size > 1)


def placed(nodes: Tensor, dim: int, rank: int) -> Tensor:
    """Nodes [size] as a layer that varies along `dim`."""
    return nodes.reshape([-1 if one == dim % rank else 1 for one in range(rank)])


@dataclass
class Dimension:
    """One dimension of a parameter, buffer or norm: its nodes are `start` to `start` + `size`."""

    name: str
    dim: int
    start: int
    size: int
    reads: bool = False
    writes: bool = False


@dataclass
class Ledger:
    """What is known of nodes."""

    dimensions: list[Dimension] = field(default_factory=list)
    count: int = 0
    _edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _fixed: list[tuple[Tensor, str]] = field(default_factory=list)
    norms: list[tuple[Tensor, int]] = field(default_factory=list)
    """Nodes of the channels of a group norm, and its groups."""
    heads: list[Tensor] = field(default_factory=list)
    split: list[Tensor] = field(default_factory=list)
    """Layers that vary along several dimensions: at the end a unit is a slab of them."""
    seen: list[Tensor] = field(default_factory=list)
    """Dimensions of activations, none of which may be emptied."""

    def dimension(self, name: str, dim: int, size: int) -> Tensor:
        """New nodes [size] for a dimension of a parameter."""
        self.dimensions.append(Dimension(name, dim, self.count, size))
        return self.fresh(size)

    def fresh(self, size: int) -> Tensor:
        """New nodes that stand for no parameter: a dimension that follows whatever it meets."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def unite(self, one: Tensor, other: Tensor, why: str) -> None:
        """Element by element; where one of two never goes, neither does the other."""
        shape = torch.broadcast_shapes(one.shape, other.shape)  # type: ignore[no-untyped-call]
        one, other = one.expand(shape).flatten(), other.expand(shape).flatten()
        here, there = one != STAYS, other != STAYS
        both = here & there
        self._edges.append((one[both], other[both]))
        self.fix(one[here & ~there], why)
        self.fix(other[there & ~here], why)

    def fix(self, nodes: Tensor, why: str) -> None:
        nodes = nodes[nodes != STAYS]
        if nodes.numel():
            self._fixed.append((torch.unique(nodes), why))

    def fix_all(self, labels: Iterable[Labels], why: str) -> None:
        for one in labels:
            for layer in one.layers:
                self.fix(layer.flatten(), why)

    def find(self, nodes: Tensor) -> list[Dimension]:
        """The dimensions that `nodes` are of."""
        starts = np.array([one.start for one in self.dimensions])
        known = torch.unique(nodes[nodes != STAYS]).numpy()
        found = []
        for index in sorted(set((np.searchsorted(starts, known, side="right") - 1).tolist())):
            one = self.dimensions[index]
            if ((known >= one.start) & (known < one.start + one.size)).any():
                found.append(one)
        return found

    # Layers

    def compact(self, full: Tensor, why: str = "it is the only one of its kind where it is used") -> Tensor | None:
        """A layer from nodes in full size; None where no element of it ever goes."""
        for dim, size in enumerate(full.shape):
            if size > 1 and bool((full.narrow(dim, 0, size - 1) == full.narrow(dim, 1, size - 1)).all()):
                full = full.narrow(dim, 0, 1)
        if full.numel() == 1:
            self.fix(full.flatten(), why)
            return None
        return full

    def labels(self, shape: Sequence[int], fulls: Iterable[Tensor | None], why: str | None = None) -> Labels:
        """Labels of a tensor of `shape` from layers in full size; what varies along one dimension is one layer."""
        layers: list[Tensor] = []
        for full in fulls:
            layer = None if full is None else self.compact(full) if why is None else self.compact(full, why)
            if layer is None:
                continue
            same = next((i for i, one in enumerate(layers) if one.shape == layer.shape), None)
            if same is None:
                layers.append(layer)
            else:
                self.unite(layers[same], layer, "two units that stay")
                layers[same] = torch.where(layers[same] == STAYS, layer, layers[same])
        return Labels(tuple(shape), tuple(layers))

    def collapse(self, layer: Tensor, axis: int) -> Tensor | None:
        """The layer that varies along `axis` alone: everything beside it goes together."""
        others = [dim for dim in range(layer.ndim) if dim != axis]
        rows = layer.permute(axis, *others).reshape(layer.shape[axis], -1)
        self.unite(rows[:, :1], rows, "part of what it goes with stays")
        return self.compact(placed(rows.amax(dim=1), axis, layer.ndim))

    def settle(self, labels: Labels) -> Labels:
        """Every layer along one dimension: of what was split, the outermost part is cut."""
        if all(len(varying(layer)) == 1 for layer in labels.layers):
            return labels
        made = [
            layer if len(varying(layer)) == 1 else self.collapse(layer, varying(layer)[0]) for layer in labels.layers
        ]
        return self.labels(labels.shape, made)

    # Units

    def close(self) -> tuple[npt.NDArray[np.int32], dict[int, str]]:
        """[nodes] the unit of each, and unit -> why it may not go."""
        units = self._components()
        while self._slabs(units):
            units = self._components()
        reasons: dict[int, str] = {}
        for nodes, why in self._fixed:
            for unit in np.unique(units[nodes.numpy()]).tolist():
                reasons.setdefault(unit, why)
        for nodes in self.seen:
            found = units[nodes[nodes != STAYS].numpy()]
            if bool((nodes != STAYS).all()) and len(found) and (found == found[0]).all():
                reasons.setdefault(int(found[0]), "it is the only one of its kind where it is used")
        return units, reasons

    def _components(self) -> npt.NDArray[np.int32]:
        if not self._edges:
            return np.arange(self.count, dtype=np.int32)
        rows = torch.cat([one for one, _ in self._edges]).numpy()
        columns = torch.cat([other for _, other in self._edges]).numpy()
        graph = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(self.count, self.count))
        found: npt.NDArray[np.int32] = connected_components(graph, directed=False)[1].astype(np.int32)
        return found

    def _slabs(self, units: npt.NDArray[np.int32]) -> bool:
        """Whether any layer was found in which a unit is no slab; its units are united until it is."""
        left = []
        for layer in self.split:
            known = torch.from_numpy(np.where(layer.numpy() == STAYS, STAYS, units[layer.numpy()]))
            axes = [dim for dim in varying(known) if not bool((known == known.narrow(dim, 0, 1)).all())]
            if len(axes) > 1:
                self.collapse(layer, axes[0])
            else:
                left.append(layer)
        more = len(left) < len(self.split)
        self.split = left
        return more
