"""Whether a network, made smaller, computes what its labels say: the same ops, each on what is left.

A module may remember a size that nothing tells it of: how many heads it has, where its halves meet. Often that fails
when it is run; sometimes it runs and means something else. So the smaller network is captured again, and every value in
it is held against the one that it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import Node

from edgegen.errors import EdgegenError
from edgegen.graph.capture import capture
from edgegen.graph.count import op_name
from edgegen.prune.axes import argument, shape_of
from edgegen.prune.find import Found
from edgegen.prune.labels import STAYS, Labels, varying
from edgegen.students.pruning import Pruning
from edgegen.students.reduce import reduce
from edgegen.students.student import Component

Stays = npt.NDArray[np.bool_]


def check(component: Component, found: Found, pruning: Pruning) -> None:
    """EdgegenError naming the first op of `component`, cut by `pruning`, that does not follow; `found` is of the
    component as it is. Blocks that are passed by are left where they are: widths alone are tried."""
    stays = _stays(found, pruning)
    module = reduce(copy.deepcopy(component.module), _widths(found, stays), weights=True)
    small = Component(component.name, module, component.inputs, component.outputs, component.examples)
    try:
        program = capture(small)
    except EdgegenError as error:
        raise not_following(component.name, f"it no longer runs: {error.message}") from error
    before = [node for node in found.axes.of if node.op == "call_function"]
    after = [node for node in program.graph.nodes if node.op == "call_function"]
    if [node.target for node in before] != [node.target for node in after]:
        raise not_following(component.name, "it runs through other ops than before")
    for old, new in zip(before, after, strict=True):
        labels = found.axes.of[old]
        if isinstance(labels, Labels):
            wanted = _left(labels, found, stays)
            if wanted != shape_of(new):
                where = found.axes.where(old)
                raise not_following(component.name, f"{where} has {list(shape_of(new))} where {list(wanted)} are left")
        if op_name(old) == "aten.slice":
            _check_start(component, found, stays, old, new)


def not_following(component: str, why: str) -> EdgegenError:
    """Of a component that remembers a size."""
    return EdgegenError(
        f"component `{component}` does not follow what is cut out of it: {why}",
        hint="a module remembers a size; prune other components: `--component NAME`",
    )


def _stays(found: Found, pruning: Pruning) -> Stays:
    """[units]"""
    stays = np.ones(int(found.units.max(initial=0)) + 1, dtype=bool)
    for one in found.axes.ledger.dimensions:
        kept = pruning.positions(one.name, one.dim)
        if kept is not None:
            gone = np.ones(one.size, dtype=bool)
            gone[list(kept)] = False
            stays[found.units[one.start : one.start + one.size][gone]] = False
    return stays


def _widths(found: Found, stays: Stays) -> Pruning:
    cuts: dict[str, dict[int, Sequence[int]]] = {}
    for one in found.axes.ledger.dimensions:
        left = stays[found.units[one.start : one.start + one.size]]
        if not left.all():
            cuts.setdefault(one.name, {})[one.dim] = np.flatnonzero(left).tolist()
    return Pruning.of(cuts)


def _kept(layer: Tensor, found: Found, stays: Stays) -> Tensor:
    nodes = layer.numpy()
    return torch.from_numpy(np.where(nodes == STAYS, True, stays[found.units[nodes]]))


def _left(labels: Labels, found: Found, stays: Stays) -> tuple[int, ...]:
    """The shape of what is left: along a dimension, the positions at which anything is."""
    shape = list(labels.shape)
    for layer in labels.layers:
        kept = _kept(layer, found, stays)
        for dim in varying(layer):
            rows = kept.movedim(dim, 0).reshape(shape[dim] if layer.shape[dim] == shape[dim] else -1, -1)
            shape[dim] = int(rows.any(dim=1).sum())
    return tuple(shape)


def _check_start(component: Component, found: Found, stays: Stays, old: Node, new: Node) -> None:
    """A slice must begin where it began, less what is gone before that."""
    labels = found.axes.get(old.args[0])
    if labels is None:
        return
    dim = argument(old, 1, "dim", 0) % len(labels.shape)
    nodes = labels.along(dim)
    start, begins = argument(old, 2, "start") or 0, argument(new, 2, "start") or 0
    if nodes is not None and start >= 0:
        wanted = int(_kept(nodes[:start], found, stays).sum())
        if wanted != begins:
            raise not_following(
                component.name, f"{found.axes.where(old)} is cut from {begins} on where {wanted} is meant"
            )
