"""One network computed again and again with other ops changed: from the first change on, not from the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from edgegen.graph.edit import user_inputs, weights
from edgegen.precision.simulate import Changed, Network

POINTS = 16
"""Where a float run is kept: so few that the tensors alive there, most of them the same ones, are a few of the
network's activations; so many that little is computed twice."""


@dataclass(frozen=True)
class FloatRun:
    """A network's float outputs on one input, and what was alive before some of its ops."""

    network: Network
    outputs: tuple[Tensor, ...]
    alive: Mapping[Node, dict[Node, Any]]
    """In the order of the graph: a call, and the values that it or later calls read."""

    @classmethod
    def of(cls, network: Network, inputs: Mapping[str, Tensor], points: int = POINTS) -> FloatRun:
        """`inputs` by name."""
        program = network.program
        named = {site.node for site in network.sites.values()}
        ops = [node for node in program.graph.nodes if node.name in named]
        kept = ops[:: max(1, len(ops) // points)]
        held = {name: value.detach() for name, value in weights(program).items()}
        held |= {node.name: inputs[node.name] for node in user_inputs(program)}
        run = _Run(network, {}, kept)
        given = (held[node.name] for node in program.graph.nodes if node.op == "placeholder")
        with torch.no_grad():
            outputs = tuple(run.run(*given, enable_io_processing=False))
        return cls(network, outputs, run.alive)

    def changed(self, changes: Mapping[str, Changed]) -> tuple[Tensor, ...]:
        """The outputs with these calls, by name, computed otherwise."""
        start: Node | None = None
        before: list[Node] = []
        for node in self.network.program.graph.nodes:
            if node in self.alive:
                start, passed = node, list(before)
            if node.name in changes:
                break
            before.append(node)
        else:
            return self.outputs
        # Without a place to start from, every site lies behind the change: kept places begin with the first of them.
        assert start is not None
        env: dict[Node, Any] = {**dict.fromkeys(passed), **self.alive[start]}
        with torch.no_grad():
            return tuple(_Run(self.network, changes, ()).run(initial_env=env, enable_io_processing=False))


class _Run(Interpreter):
    def __init__(self, network: Network, changes: Mapping[str, Changed], kept: list[Node] | tuple[()]) -> None:
        super().__init__(network.program.graph_module, garbage_collect_values=True)
        self._changes = changes
        self._kept = set(kept)
        self.alive: dict[Node, dict[Node, Any]] = {}

    def run_node(self, node: Node) -> Any:
        if node in self._kept:
            self.alive[node] = dict(self.env)
        change = self._changes.get(node.name)
        if change is None:
            return super().run_node(node)
        return change(node, *self.fetch_args_kwargs_from_env(node))
