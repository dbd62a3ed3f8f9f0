"""Fold all that depends on nothing but the timestep, for the few timesteps that a student is sampled at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor, user_inputs, weights
from edgegen.rewrite.base import Pass, Rewritten, decline

aten = torch.ops.aten


@dataclass(frozen=True)
class SpecialiseTimestep(Pass):
    """Time embedding, time MLP and every per-block projection become constants, or rows of one table.

    One timestep; the input is gone:

        %t: f32[1] = placeholder[timestep]
        %a: f32[1, 320] = embedding(%t)                       ->   %d: f32[1, 640, 1, 1] = weight
        %b: f32[1, 1280] = aten.linear(aten.silu(%a), ...)         %e = aten.add(%conv, %d)
        %d: f32[1, 640, 1, 1] = aten.unsqueeze(aten.linear(aten.silu(%b), ...))
        %e = aten.add(%conv, %d)

    Several; the input is the index of the step's timestep in `values`:

        %i: i32[1] = placeholder[step]
        %row: f32[1, N] = aten.embedding(%table, %i)
        %d: f32[1, 640, 1, 1] = aten.view(aten.slice(%row, 1, 0, 640), [1, 640, 1, 1])

    What is folded is found, not named: every call whose inputs are weights, constants and the timestep alone, up to
    the calls that also read something else. It is evaluated in fp32 as captured, so the values are those of the
    original to the bit; near t = 1000 the same features computed in fp16 are noise (half a radian a step).

    Declines, and leaves the input, when
    1. there is no user input called `input` (a distilled student may take none);
    2. nothing but a part of the output depends on it (the network is its time path);
    3. a folded value is random or mutates its input.
    """

    values: tuple[float, ...]
    """Timesteps in the order of the index."""
    input: str = "timestep"
    index: str = "step"

    name: ClassVar[str] = "specialise-timestep"
    tolerance: ClassVar[float] = 0.0
    changes_signature: ClassVar[bool] = True

    def requires(self, program: ExportedProgram) -> None:
        if not self.values or len(set(self.values)) != len(self.values):
            raise EdgegenError(f"pass `{self.name}` needs distinct timesteps, got {list(self.values)}")

    def call(self, program: ExportedProgram) -> Rewritten:
        found = [node for node in user_inputs(program) if node.name == self.input]
        if not found:
            return Rewritten(program, False)
        editor = Editor(program, self.name)
        time = next(node for node in editor.graph.nodes if node.name == self.input)
        path = _time_path(editor, time)
        frontier = [node for node in path if any(user not in path for user in node.users)]
        random = next((node for node in path if _impure(node)), None)
        if random is not None:
            return Rewritten(program, False, (decline(random, "the time path draws random numbers or mutates"),))
        if time in frontier or any(user.op == "output" for node in frontier for user in node.users):
            reason = "something beside the time path reads the timestep itself, or the time path is an output"
            return Rewritten(program, False, (decline(time, reason),))
        tables = [_evaluate(program, path, time, value) for value in self.values]
        if len(self.values) == 1:
            for node in frontier:
                with editor.at(node):
                    editor.replace(node, editor.constant(tables[0][node.name], editor.named(node, "at_timestep")))
        elif frontier:
            self._index(editor, time, frontier, tables)
        for node in reversed(path):  # asserts among them count as having an effect, so no sweep takes them
            if node is not time and not node.users:
                editor.graph.erase_node(node)
        editor.drop_input(time)
        return Rewritten(editor.finish(), True)

    def _index(self, editor: Editor, time: Node, frontier: list[Node], tables: list[dict[str, Tensor]]) -> None:
        rows = [torch.cat([table[node.name].flatten() for node in frontier]) for table in tables]
        step = editor.replace_input(time, self.index, torch.zeros(1, dtype=torch.int32))
        first = next(node for node in editor.graph.nodes if node.op == "call_function")
        with editor.at(first):
            table = editor.constant(torch.stack(rows), "timestep_table")
            row = editor.call(aten.embedding.default, table, step)
        start = 0
        for node in frontier:
            shape = list(node.meta["val"].shape)
            end = start + node.meta["val"].numel()
            with editor.at(node):
                part = editor.call(aten.slice.Tensor, row, 1, start, end)
                new = part if shape == [1, end - start] else editor.call(aten.view.default, part, shape)
                editor.replace(node, new)
            start = end

    def equivalent_inputs(self, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """At the first of the timesteps."""
        if self.input not in given:
            return dict(given), dict(given)
        before = {**given, self.input: torch.full_like(given[self.input], self.values[0])}
        after = {name: value for name, value in before.items() if name != self.input}
        if len(self.values) > 1:
            after[self.index] = torch.zeros(1, dtype=torch.int32)
        return before, after

    def ensures(self, before: ExportedProgram, result: Rewritten) -> None:
        super().ensures(before, result)
        assert not result.modified or self.input not in {node.name for node in user_inputs(result.program)}


def _time_path(editor: Editor, time: Node) -> dict[Node, None]:
    """`time` and the calls that read it, directly or not, and beside it only weights and what follows from weights."""
    fixed: set[Node] = set()  # follows from weights alone
    path: dict[Node, None] = {time: None}
    for node in editor.graph.nodes:
        if node.op == "placeholder":
            if editor.value(node) is not None:
                fixed.add(node)
        elif node.op == "call_function":
            sources = node.all_input_nodes
            if all(one in fixed for one in sources):
                fixed.add(node)
            elif all(one in fixed or one in path for one in sources):
                path[node] = None
    return path


def _impure(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable


class _Partial(Interpreter):
    """Runs the calls that follow from what is known, and leaves the others out."""

    def __init__(self, program: ExportedProgram, known: dict[str, Tensor], wanted: set[str]) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self._known = known
        self._wanted = wanted

    def run_node(self, n: Node) -> Any:
        if n.op == "placeholder":
            return self._known.get(n.name)
        if n.op != "call_function" or any(self.env.get(one) is None for one in n.all_input_nodes):
            return None
        return super().run_node(n)


def _evaluate(program: ExportedProgram, path: dict[Node, None], time: Node, value: float) -> dict[str, Tensor]:
    """The values of the time path at one timestep, by node name."""
    like = time.meta["val"]
    known = {**weights(program), time.name: torch.full(tuple(like.shape), value, dtype=like.dtype)}
    runner = _Partial(program, known, {node.name for node in path})
    given = [known.get(node.name) for node in program.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        runner.run(*given, enable_io_processing=False)
    names = {node.name for node in path}
    return {node.name: runner.env[node] for node in program.graph.nodes if node.name in names}
