"""Running an exported program as it stands, without tracing or unlifting it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from edgegen.graph.edit import user_inputs, weights


class _Watched(Interpreter):
    def __init__(self, program: ExportedProgram, watch: Callable[[Node, Any], None]) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self._watch = watch

    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        if node.op == "call_function":
            self._watch(node, value)
        return value


def evaluate(
    program: ExportedProgram,
    inputs: Mapping[str, Tensor],
    watch: Callable[[Node, Any], None] | None = None,
) -> tuple[Tensor, ...]:
    """Outputs of `program` on `inputs`, by the names of its placeholders; `watch` sees the value of every call.

    KeyError for an input that is missing; further inputs are left alone.
    """
    runner = Interpreter(program.graph_module) if watch is None else _Watched(program, watch)
    with torch.no_grad():
        outputs = runner.run(*arguments(program, inputs), enable_io_processing=False)
    return tuple(outputs)


def arguments(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What the graph of `program` takes, in order: its weights and `inputs`."""
    held: dict[str, Tensor] = {**weights(program), **{node.name: inputs[node.name] for node in user_inputs(program)}}
    return [held[node.name] for node in program.graph.nodes if node.op == "placeholder"]
