"""A graph computed call by call, for the many times that a planner does so.

`torch.fx.Interpreter` looks up, maps and copies the arguments of every call anew, which takes as long as the kernels of
a small network; here each call's arguments are found once a graph (measured on the denoiser of `shapes`, 700 calls).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

Compute = Callable[[Node, tuple[Any, ...], dict[str, Any]], Any]
"""(call, its arguments, their keywords) -> its value."""


@dataclass(frozen=True)
class _Step:
    """One call. `plain`: (place of an argument, slot of the value that it is); `nested`: places whose argument, as it
    is written, has values in it; `dead`: slots that nobody reads afterwards."""

    node: Node
    slot: int
    args: tuple[Any, ...]
    plain: tuple[tuple[int, int], ...]
    nested: tuple[int, ...]
    dead: tuple[int, ...]


class Steps:
    """The calls of a graph in order, ready to be computed; placeholders are its first slots."""

    def __init__(self, program: ExportedProgram) -> None:
        self._slots: dict[Node, int] = {}
        self._held: dict[int, Any] = {}
        """Constants of the graph module."""
        last = _last_reads(program)
        steps = []
        for node in program.graph.nodes:
            self._slots[node] = len(self._slots)
            if node.op == "get_attr":
                self._held[self._slots[node]] = _attribute(program.graph_module, str(node.target))
            elif node.op == "call_function":
                steps.append(self._step(node, last))
            elif node.op == "output":
                self._results: Any = node.args[0]
            elif node.op != "placeholder":
                raise AssertionError(f"an exported graph has no {node.op}")
        self._steps = tuple(steps)

    def run(self, given: Sequence[Any], compute: Compute) -> Any:
        """Outputs, in the graph's own structure, for the values of all placeholders; each call is `compute`d."""
        values: list[Any] = [None] * len(self._slots)
        values[: len(given)] = given
        for slot, value in self._held.items():
            values[slot] = value
        for step in self._steps:
            args = list(step.args)
            for place, slot in step.plain:
                args[place] = values[slot]
            for place in step.nested:
                args[place] = self._filled(args[place], values)
            kwargs = step.node.kwargs
            known = {name: self._filled(value, values) for name, value in kwargs.items()} if kwargs else {}
            values[step.slot] = compute(step.node, tuple(args), known)
            for slot in step.dead:
                values[slot] = None
        return self._filled(self._results, values)

    def _filled(self, written: Any, values: Sequence[Any]) -> Any:
        return map_arg(written, lambda node: values[self._slots[node]])

    def _step(self, node: Node, last: dict[Node, Node]) -> _Step:
        args = tuple(node.args)
        plain = tuple((place, self._slots[one]) for place, one in enumerate(args) if isinstance(one, Node))
        nested = tuple(place for place, one in enumerate(args) if not isinstance(one, Node) and any(_nodes(one)))
        dead = tuple(self._slots[one] for one in node.all_input_nodes if last[one] is node)
        return _Step(node, self._slots[node], args, plain, nested, dead)


def _last_reads(program: ExportedProgram) -> dict[Node, Node]:
    last: dict[Node, Node] = {}
    for node in program.graph.nodes:
        for read in node.all_input_nodes:
            last[read] = node
    return last


def _nodes(written: Any) -> Iterator[Node]:
    if isinstance(written, Node):
        yield written
    elif isinstance(written, list | tuple):
        for one in written:
            yield from _nodes(one)
    elif isinstance(written, dict):
        yield from _nodes(list(written.values()))


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module
