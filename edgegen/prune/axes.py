"""How nodes go through a graph: for each op, which positions of what it reads and gives go together.

`spaces` (`edgegen.prune.space`) are made of it. An op without a rule here ends what reaches it: nothing of that is cut,
and the reason names the op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from edgegen.graph.count import op_name
from edgegen.graph.edit import module_path
from edgegen.prune.labels import STAYS, Labels, Ledger, placed, varying

Made = Labels | list[Labels] | None


class Axes:
    """The labels of every value in a graph (`of`), and the ledger of what they mean."""

    def __init__(self, program: ExportedProgram) -> None:
        self.ledger = Ledger()
        self.of: dict[Node, Made] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self._weights: set[Node] = set()
        """Parameters, and what only moves them: their inner and outer dimensions are read and written."""
        held = {
            spec.arg.name: spec.target
            for spec in program.graph_signature.input_specs
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
        }
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.of[node] = self._placeholder(node, held.get(node.name))
            elif node.op == "call_function":
                self.of[node] = self._call(node)
            elif node.op == "output":
                for result in _nodes(node.args):
                    self.ledger.fix_all(self._all(result), "it is an output of the component")
            else:
                self.of[node] = None

    def _placeholder(self, node: Node, name: str | None) -> Made:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        shape = tuple(value.shape)
        if name is None:
            return Labels(shape)
        self._weights.add(node)
        self.sizes[name] = shape
        layers = [
            placed(self.ledger.dimension(name, dim, size), dim, len(shape))
            for dim, size in enumerate(shape)
            if size > 1
        ]
        return Labels(shape, tuple(layers))

    def _call(self, node: Node) -> Made:
        name = op_name(node).removeprefix("aten.")
        if getattr(node.target, "__name__", "") == "getitem":
            many = self.of[node.args[0]]  # type: ignore[index]
            return many[node.args[1]] if isinstance(many, list) else many  # type: ignore[index]
        value = node.meta.get("val")
        shapes = [tuple(one.shape) for one in _tensors(value)]
        given = [labels for one in _nodes((node.args, node.kwargs)) for labels in self._all(one)]
        if not shapes:
            return None
        if not any(labels.layers for labels in given) and name != "expand":
            return Labels(shapes[0]) if isinstance(value, Tensor) else [Labels(shape) for shape in shapes]
        if name in MOVES and all(one in self._weights for one in _nodes(node.args)):
            self._weights.add(node)
        rule = RULES.get(name)
        if rule is None:
            self.ledger.fix_all(given, f"{self.where(node)} (`{name}`) has no rule for what may be cut")
            return Labels(shapes[0]) if isinstance(value, Tensor) else [Labels(shape) for shape in shapes]
        return rule(self, node)

    # What rules use

    def where(self, node: Node) -> str:
        return f"`{module_path(node) or node.name}`"

    def _all(self, node: Any) -> list[Labels]:
        made = self.of.get(node)
        return [] if made is None else made if isinstance(made, list) else [made]

    def get(self, value: Any) -> Labels | None:
        made = self.of.get(value) if isinstance(value, Node) else None
        return made if isinstance(made, Labels) else None

    def settled(self, value: Any) -> Labels | None:
        labels = self.get(value)
        return None if labels is None else self.ledger.settle(labels)

    def weight(self, node: Any, dim: int, *, reads: bool = False, writes: bool = False) -> Tensor:
        """Nodes [size] of a dimension of the weight of a product."""
        nodes = vector(self.settled(node), dim)
        if node in self._weights:
            for one in self.ledger.find(nodes):
                one.reads |= reads
                one.writes |= writes
        return nodes

    def see(self, nodes: Tensor) -> None:
        if not bool((nodes == STAYS).all()):
            self.ledger.seen.append(nodes)

    def join(self, labels: Sequence[Labels], shape: Sequence[int], why: str) -> Labels:
        """Of an elementwise op with broadcasting: what stands at one place goes together."""
        rank, ledger = len(shape), self.ledger
        ranks = [Labels((1,) * (rank - len(one.shape)) + one.shape, tuple(_raised(one, rank))) for one in labels]
        while (found := _lone(ranks)) is not None:
            index, layer, axis = found
            layers = [ledger.collapse(layer, axis) if one is layer else one for one in ranks[index].layers]
            ranks[index] = ledger.labels(ranks[index].shape, layers)
        made: dict[tuple[int, ...], Tensor] = {}
        for one in ranks:
            for layer in one.layers:
                key = varying(layer)
                if key in made:
                    ledger.unite(made[key], layer, why)
                    made[key] = torch.where(made[key] == STAYS, layer, made[key])
                else:
                    made[key] = layer
        for key, layer in made.items():
            for one in ranks:
                full = all(one.shape[dim] > 1 for dim in key)
                if full and not any(varying(other) == key for other in one.layers):
                    ledger.fix(layer.flatten(), why)
        return Labels(tuple(shape), tuple(made.values()))

    def size_of_norm(self, node: Node, attribute: str, kinds: tuple[str, ...], size: int) -> Tensor | None:
        """New nodes for the size of a norm without weights; None where it is no module of those kinds."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        kind = str(stack[-1][1]).rpartition(".")[2].removesuffix("'>") if stack else ""
        if kind not in kinds or not module_path(node):
            return None
        name = f"{module_path(node)}.{attribute}"
        known = next((one for one in self.ledger.dimensions if one.name == name), None)
        if known is not None:
            return torch.arange(known.start, known.start + known.size)
        self.sizes[name] = (size,)
        return self.ledger.dimension(name, 0, size)


def vector(labels: Labels | None, dim: int) -> Tensor:
    """Nodes [size] along `dim` of settled labels."""
    assert labels is not None
    nodes = labels.along(dim)
    return torch.full((labels.shape[dim],), STAYS) if nodes is None else nodes


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def shape_of(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(value, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return found


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [one for one in value if isinstance(one, Tensor)] if isinstance(value, list | tuple) else []


def _raised(labels: Labels, rank: int) -> Iterable[Tensor]:
    return (layer.reshape((1,) * (rank - layer.ndim) + tuple(layer.shape)) for layer in labels.layers)


def _lone(ranks: Sequence[Labels]) -> tuple[int, Tensor, int] | None:
    """A layer along several dimensions that another operand does not have likewise, and the axis to settle it on: the
    outermost, or the innermost where the other is a table with rows of its own (adaLN's)."""
    for index, one in enumerate(ranks):
        for layer in one.layers:
            axes = varying(layer)
            if len(axes) < 2:
                continue
            for other in ranks:
                single = [varying(each) for each in other.layers]
                if other is one or axes in single or all(other.shape[dim] == 1 for dim in axes):
                    continue
                table = other.shape[axes[0]] > 1 and (axes[-1],) in single
                return index, layer, axes[-1] if table else axes[0]
    return None


# Rules

WIDTH = "heads go whole: what is left of them keeps its width"


def _move(axes: Axes, node: Node) -> Made:
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
    shapes = [tuple(one.shape) for one in _tensors(value)]
    if not results:
        return Labels(shapes[0]) if isinstance(value, Tensor) else [Labels(shape) for shape in shapes]
    found = [axes.ledger.labels(shape, [one[i] for one in results]) for i, shape in enumerate(shapes)]
    axes.ledger.split += [layer for one in found for layer in one.layers if len(varying(layer)) > 1]
    return found[0] if isinstance(value, Tensor) else found


def _part(dim_index: int, picks: bool = False) -> Callable[[Axes, Node], Made]:
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
        return _move(axes, node)

    return rule


def _elementwise(axes: Axes, node: Node) -> Made:
    given = [labels for one in _nodes((node.args, node.kwargs)) if (labels := axes.get(one)) is not None]
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return axes.join(given, tuple(value.shape), f"at {axes.where(node)} it meets what stays")
    return [axes.join(given, tuple(one.shape), f"at {axes.where(node)} it meets what stays") for one in _tensors(value)]


def _expand(axes: Axes, node: Node) -> Made:
    """A dimension that was 1 follows whatever it meets."""
    labels, shape = axes.get(node.args[0]), shape_of(node)
    assert labels is not None
    rank = len(shape)
    before = (1,) * (rank - len(labels.shape)) + labels.shape
    grown = [dim for dim in range(rank) if before[dim] == 1 and shape[dim] > 1]
    return Labels(shape, (*_raised(labels, rank), *(placed(axes.ledger.fresh(shape[dim]), dim, rank) for dim in grown)))


def _cat(axes: Axes, node: Node) -> Made:
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


def _pad(axes: Axes, node: Node) -> Made:
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


def _reduction(axes: Axes, node: Node) -> Made:
    """The dimensions that are summed over are gone, or hold one number for what is left."""
    if len(node.args) > 1 and isinstance(node.args[1], Node):  # the larger or the smaller of two tensors
        return _elementwise(axes, node)
    labels = axes.settled(node.args[0])
    assert labels is not None
    given = argument(node, 2 if op_name(node) in ("aten.norm", "aten.linalg_vector_norm") else 1, "dim")
    rank = len(labels.shape)
    given = given if isinstance(given, list | tuple) else [] if given is None else [given]
    dims = sorted({dim % rank for dim in given}) or list(range(rank))
    keeps = _tensors(node.meta["val"])[0].ndim == rank
    layers = []
    for layer in labels.layers:
        (dim,) = varying(layer)
        if dim in dims:
            axes.see(layer.flatten())
        else:
            layers.append(layer if keeps else layer.squeeze(dims))
    made = [Labels(tuple(one.shape), tuple(layers)) for one in _tensors(node.meta["val"])]
    return made[0] if isinstance(node.meta["val"], Tensor) else made


def _softmax(axes: Axes, node: Node) -> Made:
    labels = axes.settled(node.args[0])
    assert labels is not None
    dim = argument(node, 1, "dim", -1) % len(labels.shape)
    axes.ledger.fix(vector(labels, dim), f"{axes.where(node)} is a softmax over it")
    return Labels(labels.shape, tuple(layer for layer in labels.layers if varying(layer) != (dim,)))


def _conv(axes: Axes, node: Node) -> Made:
    return _convolved(axes, node, transposed=False, groups=argument(node, 6, "groups", 1))


def _conv_transposed(axes: Axes, node: Node) -> Made:
    return _convolved(axes, node, transposed=True, groups=argument(node, 6, "groups", 1))


def _convolution(axes: Axes, node: Node) -> Made:
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


def _linear(axes: Axes, node: Node) -> Made:
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


def _matmul(axes: Axes, node: Node) -> Made:
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


def _attention(axes: Axes, node: Node) -> Made:
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


def _group_norm(axes: Axes, node: Node) -> Made:
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
    return _in_the_plane(axes, node)


def _in_the_plane(axes: Axes, node: Node) -> Made:
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


def _layer_norm(axes: Axes, node: Node) -> Made:
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


def _batch_norm(axes: Axes, node: Node) -> Made:
    x = axes.settled(node.args[0])
    assert x is not None
    for one in node.args[1:5]:
        if isinstance(one, Node):
            axes.ledger.unite(vector(x, 1), axes.weight(one, 0), f"{axes.where(node)} norms it with what stays")
    return x


def _embedding(axes: Axes, node: Node) -> Made:
    shape, table = shape_of(node), axes.settled(node.args[0])
    axes.ledger.fix(vector(table, 0), "")
    if (index := axes.get(node.args[1])) is not None:
        axes.ledger.fix_all([index], f"{axes.where(node)} looks it up")
    outputs = axes.weight(node.args[0], 1, writes=True)
    return axes.ledger.labels(shape, [placed(outputs, -1, len(shape))])


def _pixel_shuffle(axes: Axes, node: Node) -> Made:
    """[..., C r r, H, W] -> [..., C, H r, W r]: what becomes one channel goes together."""
    x, shape = axes.settled(node.args[0]), shape_of(node)
    assert x is not None
    factor = int(node.args[1])  # type: ignore[arg-type]
    channel = len(shape) - 3
    nodes = vector(x, channel).reshape(-1, factor * factor)
    axes.ledger.unite(nodes[:, :1], nodes, f"{axes.where(node)} puts it into a channel with what stays")
    return _reshaped_picture(axes, node, x, nodes.amax(dim=1), channel)


def _pixel_unshuffle(axes: Axes, node: Node) -> Made:
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


_MOVES = """
view _unsafe_view reshape flatten unflatten permute transpose t numpy_T squeeze unsqueeze movedim swapaxes alias
repeat_interleave flip detach clone contiguous slice select chunk split split_with_sizes unbind narrow
"""
_ELEMENTWISE = """
add add_ sub rsub mul mul_ div neg abs pow square sqrt rsqrt reciprocal exp log log1p expm1 sin cos tanh sigmoid logit
erf relu relu_ relu6 silu silu_ gelu elu leaky_relu hardtanh hardswish hardsigmoid softplus mish selu celu prelu clamp
clamp_min clamp_max clip maximum minimum where masked_fill eq ne lt le gt ge logical_and logical_or logical_not
bitwise_not bitwise_and bitwise_or isnan isinf sign floor ceil round trunc fmod remainder atan2 lerp addcmul addcdiv to
_to_copy type_as float half dropout dropout_ feature_dropout lift_fresh_copy zeros_like ones_like full_like empty_like
rand_like randn_like copy fill nan_to_num threshold hardshrink softsign
"""
_IN_THE_PLANE = """
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d
upsample_trilinear3d _upsample_nearest_exact2d avg_pool1d avg_pool2d avg_pool3d max_pool2d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d reflection_pad2d replication_pad2d replication_pad3d
"""
_REDUCTIONS = "mean sum amax amin prod var std var_mean logsumexp norm linalg_vector_norm any all max min"
MOVES = frozenset(_MOVES.split())
"""Ops that only move elements."""

RULES: Mapping[str, Callable[[Axes, Node], Made]] = {
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_IN_THE_PLANE.split(), _in_the_plane),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transposed),
    **dict.fromkeys(("matmul", "bmm", "mm", "addmm", "baddbmm"), _matmul),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("cat", "concat", "stack"), _cat),
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad),
    **dict.fromkeys(("slice", "narrow"), _part(1)),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _part(2)),
    "select": _part(1, picks=True),
    "unbind": _part(1, picks=True),
    "expand": _expand,
    "convolution": _convolution,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _batch_norm,
    "embedding": _embedding,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
}
