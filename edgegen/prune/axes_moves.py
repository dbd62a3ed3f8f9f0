"""How labels go through ops that move, combine and reduce elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.count import op_name
from edgegen.prune.axes import Axes, Made, argument, nodes_in, raised, shape_of, tensors_in, vector
from edgegen.prune.labels import STAYS, Labels, placed, varying


def move(axes: Axes, node: Node) -> Made:
    """Done to layers as to values."""
    labels, target = axes.get(node.args[0]), node.target
    assert labels is not None and callable(target)
    name = op_name(node)
    call: Callable[..., Any] = target
    if name in ("aten.view", "aten._unsafe_view"):
        call = torch.ops.aten.reshape.default
    results: list[list[Tensor]] = []
    for layer in labels.layers:
        made = call(layer.expand(labels.shape), *node.args[1:], **node.kwargs)
        results.append(list(made) if isinstance(made, list | tuple) else [made])
    value = node.meta["val"]
    shapes = [tuple(one.shape) for one in tensors_in(value)]
    if not results:
        return Labels(shapes[0]) if isinstance(value, Tensor) else [Labels(shape) for shape in shapes]
    found = [axes.ledger.labels(shape, [one[i] for one in results]) for i, shape in enumerate(shapes)]
    axes.ledger.split += [layer for one in found for layer in one.layers if len(varying(layer)) > 1]
    return found[0] if isinstance(value, Tensor) else found


def part(dim_index: int, picks: bool = False) -> Callable[[Axes, Node], Made]:
    """A slice: what was split is not cut along the dimension that is sliced. `picks`: by position, so that none of
    them may go."""

    def rule(axes: Axes, node: Node) -> Made:
        labels = axes.get(node.args[0])
        assert labels is not None
        dim = argument(node, dim_index, "dim", 0) % len(labels.shape)
        layers: list[Tensor | None] = []
        for layer in labels.layers:
            along = varying(layer)
            if dim in along and len(along) > 1:
                layers.append(axes.ledger.collapse(layer, next(one for one in along if one != dim)))
            else:
                layers.append(layer)
                if picks and along == (dim,):
                    axes.ledger.fix(layer.flatten(), f"{axes.where(node)} picks it by its position")
        axes.of[node.args[0]] = axes.ledger.labels(labels.shape, layers)  # type: ignore[index]
        return move(axes, node)

    return rule


def elementwise(axes: Axes, node: Node) -> Made:
    given = [labels for one in nodes_in((node.args, node.kwargs)) if (labels := axes.get(one)) is not None]
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return axes.join(given, tuple(value.shape), f"at {axes.where(node)} it meets what stays")
    return [
        axes.join(given, tuple(one.shape), f"at {axes.where(node)} it meets what stays") for one in tensors_in(value)
    ]


def expand(axes: Axes, node: Node) -> Made:
    """A dimension that was 1 follows whatever it meets."""
    labels, shape = axes.get(node.args[0]), shape_of(node)
    assert labels is not None
    rank = len(shape)
    before = (1,) * (rank - len(labels.shape)) + labels.shape
    grown = [dim for dim in range(rank) if before[dim] == 1 and shape[dim] > 1]
    return Labels(shape, (*raised(labels, rank), *(placed(axes.ledger.fresh(shape[dim]), dim, rank) for dim in grown)))


def cat(axes: Axes, node: Node) -> Made:
    parts = [axes.settled(one) for one in node.args[0]]  # type: ignore[union-attr]
    shape = shape_of(node)
    stacked = op_name(node) == "aten.stack"
    dim = argument(node, 1, "dim", 0) % len(shape)
    found = [one for one in parts if one is not None and 0 not in one.shape]
    if stacked:
        found = [
            Labels((*one.shape[:dim], 1, *one.shape[dim:]), tuple(layer.unsqueeze(dim) for layer in one.layers))
            for one in found
        ]
    side_by_side = torch.cat([vector(one, dim) for one in found])
    rest = [
        Labels((*one.shape[:dim], 1, *one.shape[dim + 1 :]), tuple(x for x in one.layers if varying(x) != (dim,)))
        for one in found
    ]
    beside = axes.join(rest, shape, f"at {axes.where(node)} it lies beside what stays")
    return axes.ledger.labels(shape, [*beside.layers, placed(side_by_side, dim, len(shape))])


def pad(axes: Axes, node: Node) -> Made:
    """What is added stays, and goes with nothing."""
    labels, shape = axes.get(node.args[0]), shape_of(node)
    assert labels is not None
    widths = list(node.args[1])  # type: ignore[arg-type]
    layers: list[Tensor | None] = []
    for layer in axes.ledger.settle(labels).layers:
        (dim,) = varying(layer)
        place = 2 * (len(shape) - 1 - dim)
        before, after = widths[place : place + 2] if place < len(widths) else (0, 0)
        nodes = layer.flatten()
        stays = [torch.full((max(0, width),), STAYS) for width in (before, after)]
        if before < 0 or after < 0:
            axes.ledger.fix(nodes, f"{axes.where(node)} crops it")
            continue
        layers.append(placed(torch.cat([stays[0], nodes, stays[1]]), dim, len(shape)))
    return axes.ledger.labels(shape, layers)


def reduction(axes: Axes, node: Node) -> Made:
    """The dimensions that are summed over are gone, or hold one number for what is left."""
    if len(node.args) > 1 and isinstance(node.args[1], Node):  # the larger or the smaller of two tensors
        return elementwise(axes, node)
    labels = axes.settled(node.args[0])
    assert labels is not None
    given = argument(node, 2 if op_name(node) in ("aten.norm", "aten.linalg_vector_norm") else 1, "dim")
    rank = len(labels.shape)
    given = given if isinstance(given, list | tuple) else [] if given is None else [given]
    dims = sorted({dim % rank for dim in given}) or list(range(rank))
    keeps = tensors_in(node.meta["val"])[0].ndim == rank
    layers = []
    for layer in labels.layers:
        (dim,) = varying(layer)
        if dim in dims:
            axes.see(layer.flatten())
        else:
            layers.append(layer if keeps else layer.squeeze(dims))
    made = [Labels(tuple(one.shape), tuple(layers)) for one in tensors_in(node.meta["val"])]
    return made[0] if isinstance(node.meta["val"], Tensor) else made


def softmax(axes: Axes, node: Node) -> Made:
    labels = axes.settled(node.args[0])
    assert labels is not None
    dim = argument(node, 1, "dim", -1) % len(labels.shape)
    axes.ledger.fix(vector(labels, dim), f"{axes.where(node)} is a softmax over it")
    return Labels(labels.shape, tuple(layer for layer in labels.layers if varying(layer) != (dim,)))


def in_the_plane(axes: Axes, node: Node) -> Made:
    """Nothing that is done to each channel of a picture alone changes which channels there are."""
    x, shape = axes.settled(node.args[0]), shape_of(node)
    assert x is not None
    layers = []
    for layer in x.layers:
        if varying(layer)[0] < 2:
            layers.append(layer)
        else:
            axes.ledger.fix(layer.flatten(), f"{axes.where(node)} mixes it in the plane")
    return Labels(shape, tuple(layers))


def pixel_shuffle(axes: Axes, node: Node) -> Made:
    """[..., C r r, H, W] -> [..., C, H r, W r]: what becomes one channel goes together."""
    x, shape = axes.settled(node.args[0]), shape_of(node)
    assert x is not None
    factor = int(node.args[1])  # type: ignore[arg-type]
    channel = len(shape) - 3
    nodes = vector(x, channel).reshape(-1, factor * factor)
    axes.ledger.unite(nodes[:, :1], nodes, f"{axes.where(node)} puts it into a channel with what stays")
    return _reshaped_picture(axes, node, x, nodes.amax(dim=1), channel)


def pixel_unshuffle(axes: Axes, node: Node) -> Made:
    x, shape = axes.settled(node.args[0]), shape_of(node)
    assert x is not None
    factor = int(node.args[1])  # type: ignore[arg-type]
    channel = len(shape) - 3
    return _reshaped_picture(axes, node, x, vector(x, channel).repeat_interleave(factor * factor), channel)


def _reshaped_picture(axes: Axes, node: Node, x: Labels, channels: Tensor, at: int) -> Labels:
    shape = shape_of(node)
    layers: list[Tensor | None] = [placed(channels, at, len(shape))]
    for layer in x.layers:
        (dim,) = varying(layer)
        if dim < at:
            layers.append(layer)
        elif dim > at:
            axes.ledger.fix(layer.flatten(), f"{axes.where(node)} mixes it in the plane")
    return axes.ledger.labels(shape, layers)
