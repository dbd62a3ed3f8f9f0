"""Core ATen decompositions, op by op: what `ExportedProgram.run_decompositions` gives, without tracing the whole graph.

Calls of one op on tensors alike are decomposed once, so a network of repeated blocks takes a fraction of the time. The
result is a graph to look at, not a program to run.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram, default_decompositions
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

Target = torch._ops.OpOverload


def decomposed(program: ExportedProgram, kept: Collection[Target]) -> tuple[Graph, dict[Node, Node]]:
    """`program`'s graph in core ATen with the ops of `kept` whole, and which node of `program` each of its calls is of.

    Placeholders keep their names. Calls that nothing reads are gone.
    """
    values = [node.meta["val"] for node in program.graph.nodes if node.meta.get("val") is not None]
    work = _Decomposition(kept, detect_fake_mode(values))
    for node in program.graph.nodes:
        work.add(node, node)
    work.graph.eliminate_dead_code()
    return work.graph, {node: source for node, source in work.origin.items() if node in set(work.graph.nodes)}


class _Decomposition:
    def __init__(self, kept: Collection[Target], fake: FakeTensorMode | None) -> None:
        self.graph = Graph()
        self.origin: dict[Node, Node] = {}
        table = dict(default_decompositions().items())  # type: ignore[no-untyped-call]
        table[torch.ops.aten.native_batch_norm.default] = _batch_norm
        self._table = {op: how for op, how in table.items() if op not in kept}
        self._kept = frozenset(kept)
        self._fake = fake
        self._values: dict[Node, Any] = {}
        self._traced: dict[tuple[Any, ...], Graph] = {}

    def add(self, node: Node, source: Node) -> None:
        """Append `node`, or what it is made of, on behalf of `source`."""
        if node.target is operator.getitem and not isinstance(self._values[node.args[0]], Node):  # type: ignore[index]
            self._values[node] = self._values[node.args[0]][node.args[1]]  # type: ignore[index]
        elif self._whole(node):
            made = self.graph.node_copy(node, self._values.__getitem__)
            if node.op == "placeholder":
                made.name = node.name  # fx renames what is called as something of Python's, such as `input`
            self._values[node] = made
            self.origin[made] = source
        else:
            self._inline(node, source)

    def _whole(self, node: Node) -> bool:
        target = node.target
        if node.op != "call_function" or not isinstance(target, Target) or target in self._kept:
            return True
        return target not in self._table and not (_is_cia_op(target) and not _is_preservable_cia_op(target))

    def _inline(self, node: Node, source: Node) -> None:
        traced = self._trace(node)
        given: Iterator[Any] = (self._values[one] for one in pytree.tree_leaves((node.args, node.kwargs)) if _node(one))
        for inner in traced.nodes:
            if inner.op == "placeholder":
                self._values[inner] = next(given)
            elif inner.op == "output":
                self._values[node] = pytree.tree_map(
                    lambda one: self._values[one] if _node(one) else one, inner.args[0]
                )
            elif inner.target == node.target:  # it is its own decomposition
                made = self.graph.node_copy(inner, self._values.__getitem__)
                self._values[inner] = made
                self.origin[made] = source
            else:
                self.add(inner, source)

    def _trace(self, node: Node) -> Graph:
        leaves, form = pytree.tree_flatten((node.args, node.kwargs))
        key = (node.target, str(form), *(_described(one) for one in leaves))
        if key not in self._traced:
            places = [place for place, one in enumerate(leaves) if _node(one)]

            def call(*tensors: Tensor) -> Any:
                filled = list(leaves)
                for place, tensor in zip(places, tensors, strict=True):
                    filled[place] = tensor
                args, kwargs = pytree.tree_unflatten(filled, form)
                assert callable(node.target)
                return node.target(*args, **kwargs)

            # Ops of the table are met before autograd's own decompositions; the others are decomposed by just those.
            early = node.target in self._table
            with self._fake or nullcontext(), torch.no_grad():
                made = make_fx(call, decomposition_table=self._table, pre_dispatch=early)(
                    *(leaves[place].meta["val"] for place in places)
                )
            # One graph serves many calls: each of its nodes stands for the call at hand until the next one.
            self._traced[key] = made.graph
        return self._traced[key]


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """The functional form that `run_decompositions` arrives at."""
    aten = torch.ops.aten
    if not training:
        return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, variance, momentum, eps)
    if mean is None:
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, True, momentum, eps)
    return NotImplemented


def _node(value: Any) -> bool:
    return isinstance(value, Node)


def _described(value: Any) -> Any:
    if not isinstance(value, Node):
        return repr(value)
    tensor = value.meta["val"]
    if not isinstance(tensor, Tensor):
        return value
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype)
