"""How labels go through products, attention and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.count import op_name
from edgegen.prune.axes import Axes, Made, argument, shape_of, vector
from edgegen.prune.axes_moves import in_the_plane
from edgegen.prune.labels import STAYS, Labels, Ledger, placed, varying

WIDTH = "heads go whole: what is left of them keeps its width"


def conv(axes: Axes, node: Node) -> Made:
    return _convolved(axes, node, transposed=False, groups=argument(node, 6, "groups", 1))


def conv_transposed(axes: Axes, node: Node) -> Made:
    return _convolved(axes, node, transposed=True, groups=argument(node, 6, "groups", 1))


def convolution(axes: Axes, node: Node) -> Made:
    return _convolved(axes, node, bool(argument(node, 6, "transposed")), argument(node, 8, "groups", 1))


def _convolved(axes: Axes, node: Node, transposed: bool, groups: int) -> Made:
    """x [N, I, ...], weight [O, I / groups, ...] or, transposed, [I, O / groups, ...]. Of a grouped convolution a group
    goes whole, with what it reads and what it gives."""
    ledger, shape, where = axes.ledger, shape_of(node), axes.where(node)
    x = axes.settled(node.args[0])
    assert x is not None
    if len(x.shape) != len(shape_of(node.args[1])):  # type: ignore[arg-type]
        ledger.fix_all([x], f"{where} takes no batch")
        return Labels(shape)
    inputs = vector(x, 1)
    axes.see(inputs)
    weight = axes.settled(node.args[1])
    assert weight is not None
    for dim in range(2, len(weight.shape)):
        ledger.fix(vector(weight, dim), "")
    if groups == 1:
        reads = axes.weight(node.args[1], 0 if transposed else 1, reads=True)
        outputs = axes.weight(node.args[1], 1 if transposed else 0, writes=True)
        ledger.unite(inputs, reads, f"{where} reads it beside what stays")
    else:
        rows = axes.weight(node.args[1], 0, writes=True).reshape(groups, -1)
        ledger.fix(vector(weight, 1), f"{where} shares it among its groups")
        ledger.unite(rows[:, :1], rows, f"{where} has part of a group that stays")
        ledger.unite(inputs.reshape(groups, -1), rows[:, :1], f"{where} reads it in a group with what stays")
        outputs = rows[:, :1].expand(groups, shape[1] // groups).flatten() if transposed else rows.flatten()
    _bias(axes, argument(node, 2, "bias"), outputs, where)
    passed = []
    for layer in x.layers:
        if varying(layer) == (0,):
            passed.append(layer.reshape(-1, *(1,) * (len(shape) - 1)))
        elif varying(layer) != (1,):
            ledger.fix(layer.flatten(), f"{where} mixes it in the plane")
    return ledger.labels(shape, [*passed, placed(outputs, 1, len(shape))])


def _bias(axes: Axes, bias: Any, outputs: Tensor, where: str) -> None:
    if isinstance(bias, Node):
        axes.ledger.unite(axes.weight(bias, 0, writes=True), outputs, f"{where} writes it beside what stays")


def linear(axes: Axes, node: Node) -> Made:
    x, shape, where = axes.settled(node.args[0]), shape_of(node), axes.where(node)
    assert x is not None
    last = len(shape) - 1
    inputs = vector(x, last)
    axes.see(inputs)
    axes.ledger.unite(inputs, axes.weight(node.args[1], 1, reads=True), f"{where} reads it beside what stays")
    outputs = axes.weight(node.args[1], 0, writes=True)
    _bias(axes, argument(node, 2, "bias"), outputs, where)
    passed = [layer for layer in x.layers if varying(layer) != (last,)]
    return axes.ledger.labels(shape, [*passed, placed(outputs, last, len(shape))])


def _batches(labels: Labels) -> Labels:
    """The dimensions before the last two."""
    rank = len(labels.shape) - 2
    layers = tuple(layer.reshape(layer.shape[:rank]) for layer in labels.layers if varying(layer)[0] < rank)
    return Labels(labels.shape[:rank], layers)


def _with_matrix(batch: Labels, rows: Tensor, columns: Tensor, shape: tuple[int, ...], ledger: Ledger) -> Labels:
    layers = [layer.reshape(*layer.shape, 1, 1) for layer in batch.layers]
    return ledger.labels(shape, [*layers, placed(rows, -2, len(shape)), placed(columns, -1, len(shape))])


def matmul(axes: Axes, node: Node) -> Made:
    """[..., M, K] by [..., K, N]; `addmm` and `baddbmm` add their first argument to it."""
    name, shape, where, ledger = op_name(node), shape_of(node), axes.where(node), axes.ledger
    added = name in ("aten.addmm", "aten.baddbmm")
    first, second = node.args[1:3] if added else node.args[:2]
    left, right = axes.settled(first), axes.settled(second)
    assert left is not None and right is not None
    if len(left.shape) < 2 or len(right.shape) < 2:
        ledger.fix_all([left, right], f"{where} multiplies a vector")
        return Labels(shape)
    rows = axes.weight(first, -2, writes=True)
    inner = axes.weight(first, -1, reads=True), axes.weight(second, -2, reads=True)
    columns = axes.weight(second, -1, writes=True)
    ledger.unite(*inner, f"{where} sums over it beside what stays")
    axes.see(inner[0])
    batch = axes.join([_batches(left), _batches(right)], shape[:-2], f"{where} multiplies it with what stays")
    ledger.heads += [layer.flatten() for layer in batch.layers]
    if batch.layers:
        if first not in axes._weights:
            ledger.fix(rows, WIDTH)
            rows = torch.full_like(rows, STAYS)
        if second not in axes._weights:
            ledger.fix(columns, WIDTH)
            columns = torch.full_like(columns, STAYS)
    made = _with_matrix(batch, rows, columns, shape, ledger)
    if added and (extra := axes.get(node.args[0])) is not None:
        return axes.join([made, extra], shape, f"at {where} it meets what stays")
    return made


def attention(axes: Axes, node: Node) -> Made:
    """q [..., L, E], k [..., S, E], v [..., S, V]. A softmax goes over S, and the scale follows E."""
    shape, where, ledger = shape_of(node), axes.where(node), axes.ledger
    q, k, v = (axes.settled(one) for one in node.args[:3])
    assert q is not None and k is not None and v is not None
    batches = [_batches(one) for one in (q, k, v)]
    if argument(node, 6, "enable_gqa", False):
        batches[1:] = [_repeated(one, batches[0].shape) for one in batches[1:]]
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node) and (over := axes.settled(mask)) is not None and len(over.shape) >= 2:
        batches.append(_batches(over))
        for dim in (-2, -1):
            ledger.fix(vector(over, dim), f"{where} is a softmax over it")
    batch = axes.join(batches, shape[:-2], f"{where} multiplies it with what stays")
    ledger.heads += [layer.flatten() for layer in batch.layers]
    for one in (k, v):
        ledger.fix(vector(one, -2), f"{where} is a softmax over it")
    for one in (q, k):
        ledger.fix(vector(one, -1), f"the scale of {where} follows the width of a head")
    # Code takes the values' width for that of the keys.
    ledger.fix(vector(v, -1), WIDTH)
    return _with_matrix(batch, vector(q, -2), torch.full((shape[-1],), STAYS), shape, ledger)


def _repeated(batch: Labels, shape: Sequence[int]) -> Labels:
    """Keys and values that several heads share, once for each."""
    times = shape[-1] // batch.shape[-1]
    layers = tuple(
        layer.repeat_interleave(times, -1) if varying(layer) == (len(shape) - 1,) else layer for layer in batch.layers
    )
    return Labels((*batch.shape[:-1], shape[-1]), layers)


def group_norm(axes: Axes, node: Node) -> Made:
    x, where, ledger = axes.settled(node.args[0]), axes.where(node), axes.ledger
    assert x is not None
    groups = int(node.args[1])  # type: ignore[arg-type]
    channels = vector(x, 1)
    weights = [one for one in (argument(node, 2, "weight"), argument(node, 3, "bias")) if isinstance(one, Node)]
    for one in weights:
        ledger.unite(channels, axes.weight(one, 0), f"{where} norms it with what stays")
    if not weights:
        size = axes.size_of_norm(node, "num_channels", ("GroupNorm",), x.shape[1])
        if size is None:
            ledger.fix(channels, f"{where} is a norm of a fixed size")
        else:
            ledger.unite(channels, size, f"{where} norms it with what stays")
    if not bool((channels == STAYS).all()):
        axes.see(channels)
        ledger.norms.append((channels, groups))
    return in_the_plane(axes, node)


def layer_norm(axes: Axes, node: Node) -> Made:
    """Over the last dimension; also RMSNorm. Over several, nothing of them is cut."""
    x, where, ledger = axes.settled(node.args[0]), axes.where(node), axes.ledger
    assert x is not None
    normed: Any = node.args[1]
    channels = vector(x, -1)
    weights = [one for one in node.args[2:4] if isinstance(one, Node)]
    if len(normed) > 1:
        ledger.fix_all([labels for one in weights if (labels := axes.get(one))], f"{where} norms several dimensions")
        for dim in range(1, len(normed) + 1):
            ledger.fix(vector(x, -dim), f"{where} norms several dimensions")
        return x
    for one in weights:
        ledger.unite(channels, axes.weight(one, 0), f"{where} norms it with what stays")
    if not weights and not bool((channels == STAYS).all()):
        size = axes.size_of_norm(node, "normalized_shape", ("LayerNorm", "RMSNorm"), x.shape[-1])
        if size is None:
            ledger.fix(channels, f"{where} is a norm of a fixed size")
        else:
            ledger.unite(channels, size, f"{where} norms it with what stays")
    axes.see(channels)
    return x


def batch_norm(axes: Axes, node: Node) -> Made:
    x = axes.settled(node.args[0])
    assert x is not None
    for one in node.args[1:5]:
        if isinstance(one, Node):
            axes.ledger.unite(vector(x, 1), axes.weight(one, 0), f"{axes.where(node)} norms it with what stays")
    return x


def embedding(axes: Axes, node: Node) -> Made:
    shape, table = shape_of(node), axes.settled(node.args[0])
    axes.ledger.fix(vector(table, 0), "")
    if (index := axes.get(node.args[1])) is not None:
        axes.ledger.fix_all([index], f"{axes.where(node)} looks it up")
    outputs = axes.weight(node.args[0], 1, writes=True)
    return axes.ledger.labels(shape, [placed(outputs, -1, len(shape))])
