"""How nodes go through a graph: for each op, which positions of what it reads and gives go together.

`spaces` (`edgegen.prune.space`) are made of it. An op without a rule (`edgegen.prune.axes_rules`) ends what reaches it:
nothing of that is cut, and the reason names the op.
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
Rule = Callable[["Axes", Node], Made]

_MOVES = """
view _unsafe_view reshape flatten unflatten permute transpose t numpy_T squeeze unsqueeze movedim swapaxes alias
repeat_interleave flip detach clone contiguous slice select chunk split split_with_sizes unbind narrow
"""
MOVES = frozenset(_MOVES.split())
"""Ops that only move elements."""


class Axes:
    """The labels of every value in a graph (`of`), and the ledger of what they mean."""

    def __init__(self, program: ExportedProgram, rules: Mapping[str, Rule]) -> None:
        self._rules = rules
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
                for result in nodes_in(node.args):
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
        shapes = [tuple(one.shape) for one in tensors_in(value)]
        given = [labels for one in nodes_in((node.args, node.kwargs)) for labels in self._all(one)]
        if not shapes:
            return None
        if not any(labels.layers for labels in given) and name != "expand":
            return Labels(shapes[0]) if isinstance(value, Tensor) else [Labels(shape) for shape in shapes]
        if name in MOVES and all(one in self._weights for one in nodes_in(node.args)):
            self._weights.add(node)
        rule = self._rules.get(name)
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
        ranks = [Labels((1,) * (rank - len(one.shape)) + one.shape, tuple(raised(one, rank))) for one in labels]
        while (found := lone(ranks)) is not None:
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


def nodes_in(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(value, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return found


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [one for one in value if isinstance(one, Tensor)] if isinstance(value, list | tuple) else []


def raised(labels: Labels, rank: int) -> Iterable[Tensor]:
    return (layer.reshape((1,) * (rank - layer.ndim) + tuple(layer.shape)) for layer in labels.layers)


def lone(ranks: Sequence[Labels]) -> tuple[int, Tensor, int] | None:
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
