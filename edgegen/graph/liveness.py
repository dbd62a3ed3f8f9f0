"""How much memory a graph needs while it runs: an estimate from when each value is made and last read."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import weights

_VIEWS = frozenset(
    {
        *("aten.view", "aten.reshape", "aten._unsafe_view", "aten.unsqueeze", "aten.squeeze", "aten.permute"),
        *("aten.transpose", "aten.t", "aten.expand", "aten.alias", "aten.detach", "aten.slice", "aten.select"),
        *("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.flatten", "aten.unflatten"),
    }
)
"""Ops whose result can lie where their operand does."""


class Footprint(BaseModel):
    """Bytes of one graph: `weights`, each shared one once, and `activations`, the most that is alive at once, inputs
    and outputs among it; `at` is the call where that is.

    An estimate: runtimes copy what torch views, need scratch of their own, and reuse what this keeps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: int
    activations: int
    at: str

    @property
    def total(self) -> int:
        return self.weights + self.activations


def footprint(program: ExportedProgram) -> Footprint:
    """The memory that running `program` in its own order takes, with its own dtypes. Shapes must be static."""
    held = weights(program)
    placed: dict[Node, Node] = {}  # value -> the value whose memory it lies in
    last: dict[Node, Node] = {}  # value with memory of its own -> its last reader
    for node in program.graph.nodes:
        placed[node] = placed[node.all_input_nodes[0]] if _is_view(node) else node
        for source in node.all_input_nodes:
            last[placed[source]] = node
    freed: dict[Node, list[Node]] = {}
    for value, reader in last.items():
        freed.setdefault(reader, []).append(value)
    alive = most = 0
    at = ""
    for node in program.graph.nodes:
        if node.name not in held and placed[node] is node and node.op != "output":
            alive += _bytes(node.meta.get("val"))
            if alive > most:
                most, at = alive, node.name
        alive -= sum(_bytes(value.meta.get("val")) for value in freed.get(node, ()) if value.name not in held)
    return Footprint(weights=_distinct(held.values()), activations=most, at=at)


def weight_bytes(program: ExportedProgram) -> int:
    """Bytes of the weights of `program`, each shared one once."""
    return _distinct(weights(program).values())


def _distinct(tensors: Any) -> int:
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _is_view(node: Node) -> bool:
    target = node.target
    if getattr(target, "__name__", "") == "getitem":
        return True
    return isinstance(target, torch._ops.OpOverload) and f"{target.namespace}.{target._opname}" in _VIEWS


def _bytes(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(_bytes(one) for one in value)
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
