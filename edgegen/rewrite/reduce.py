"""Reduce a failing graph to the smallest one that still fails: delta debugging (Zeller and Hildebrandt, "Simplifying
and Isolating Failure-Inducing Input", 2002) over an exported program.

Four moves, each of which gives a valid program and fewer calls, outputs or inputs:

- end earlier: the program returns the values that are alive at some point, and what comes after is gone;
- begin later: values that are alive at some point become inputs, with the tensors that were computed there;
- take a stretch of calls out: what it gives to the rest becomes inputs;
- leave out a call that gives what it takes: its readers read its argument of the same shape and dtype.

All of it is deterministic: the same program, inputs and predicate give the same reduced program.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.edit import Editor, user_inputs
from edgegen.graph.evaluate import evaluate
from edgegen.graph.text import graph_text
from edgegen.rewrite.base import Pass
from edgegen.rewrite.observe import PassMismatch, hold

aten = torch.ops.aten
BY = "reduce"
CARRIED = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.int32: torch.int32,
    torch.int64: torch.int32,
    torch.bool: torch.int32,
}
"""Dtype of a value -> that of the input or output which stands for it: saved programs take and give these two only."""

Fails = Callable[[ExportedProgram, Mapping[str, Tensor]], bool]
"""Whether a program still fails on its inputs. One that raises is taken as a no: what it met is another failure."""


@dataclass(frozen=True)
class Reduced:
    """The smallest program found that fails, and the inputs on which it does, by placeholder name.

    `complete`: no move makes it smaller; otherwise the budget of calls or seconds ended first.
    """

    program: ExportedProgram
    inputs: Mapping[str, Tensor]
    ops_before: int
    ops: int
    asked: int
    """How often the predicate was asked."""
    seconds: float
    complete: bool


def reduce(
    program: ExportedProgram,
    inputs: Mapping[str, Tensor],
    fails: Fails,
    *,
    most_calls: int = 400,
    most_seconds: float = 600.0,
    progress: Callable[[int, int], None] | None = None,
) -> Reduced:
    """Reduce `program`, which stays as it is. `progress(ops left, predicate calls)` is told of each smaller program.

    EdgegenError when the program does not fail to begin with, or has no outputs that can be kept.
    """
    search = _Search(fails, most_calls, most_seconds, progress)
    given = {node.name: inputs[node.name] for node in user_inputs(program)}
    if not search.ask(program, given):
        raise EdgegenError("the program does not fail on these inputs, so there is nothing to reduce")
    search.start(program, given)
    search.run()
    return Reduced(
        program=search.program,
        inputs=search.inputs,
        ops_before=len(_calls(program)),
        ops=len(_calls(search.program)),
        asked=search.asked,
        seconds=round(time.monotonic() - search.started, 1),
        complete=not search.spent,
    )


def pass_fails(one: Pass, error: BaseException) -> Fails:
    """Whether `one` fails as it did with `error`: raises the same class, or gives numbers beyond its tolerance."""

    def fails(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> bool:
        try:
            given, renamed = one.equivalent_inputs(inputs)
            result = one(program)
            if result.modified:
                hold(one, program, given, result.program, renamed)
        except Exception as found:
            return type(found) is type(error) or (isinstance(error, PassMismatch) and isinstance(found, PassMismatch))
        return False

    return fails


def save(reduced: Reduced, folder: Path, passes: str, *, lower: str | None = None) -> Path:
    """Write `program.pt2`, `inputs.safetensors`, `graph.txt` and `reproduce.sh`, and return the last.

    `passes` is what the command runs, as `edgegen passes run --passes` reads it, and `lower` the backend and precision
    that it lowers the result with and holds it against. EdgegenError when `folder` cannot be
    written; UsageError for a program that `edgegen` would not open again (an input of another dtype than float32 and
    int32).
    """
    from safetensors.torch import save_file

    strange = [node.name for node in user_inputs(reduced.program) if node.meta["val"].dtype not in CARRIED.values()]
    if strange:
        raise UsageError(f"the reduced program takes `{strange[0]}`, which is neither float32 nor int32")
    proof = ["--lower", lower] if lower else ["--verify"]
    command = shlex.join(
        ["edgegen", "passes", "run", "program.pt2", "--inputs", "inputs.safetensors", "--passes", passes, *proof]
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.export.save(reduced.program, folder / "program.pt2")
        save_file({name: value.contiguous() for name, value in reduced.inputs.items()}, folder / "inputs.safetensors")
        (folder / "graph.txt").write_text(graph_text(reduced.program), encoding="utf-8")
        script = folder / "reproduce.sh"
        script.write_text(f'#!/bin/sh\ncd "$(dirname "$0")" && exec {command}\n', encoding="utf-8")
        script.chmod(0o755)
    except (OSError, RuntimeError) as error:  # torch's zip writer tells a full disk as a RuntimeError
        raise EdgegenError(f"`{folder}` cannot be written: {' '.join(str(error).split())[:200]}") from error
    return script


class _Search:
    def __init__(
        self,
        fails: Fails,
        most_calls: int,
        most_seconds: float,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._fails = fails
        self._most_calls = most_calls
        self._progress = progress
        self.started = time.monotonic()
        self._until = self.started + most_seconds
        self._asked_before: set[str] = set()
        self.asked = 0
        self.spent = False
        self.program: ExportedProgram
        self.inputs: dict[str, Tensor]

    def start(self, program: ExportedProgram, inputs: dict[str, Tensor]) -> None:
        self.program, self.inputs = program, inputs

    def ask(self, program: ExportedProgram, inputs: Mapping[str, Tensor]) -> bool:
        self.asked += 1
        try:
            return self._fails(program, inputs)
        except Exception:
            return False

    def run(self) -> None:
        self._bisect(_end_at)
        self._bisect(_begin_at)
        while not self.spent and self._sweep():
            pass

    def _bisect(self, cut: Callable[[ExportedProgram, Mapping[str, Tensor], int], _Candidate | None]) -> None:
        """Halve the stretch of the graph that is kept, as long as a half fails."""
        step = len(_calls(self.program)) // 2
        while step and not self.spent:
            if not self._try(cut(self.program, self.inputs, step)):
                step //= 2
            else:
                step = min(step, len(_calls(self.program)) // 2)

    def _sweep(self) -> bool:
        """One round of all moves, long stretches first; whether any of them made it smaller."""
        size = _size(self.program)
        stretch = max(1, len(_calls(self.program)) // 2)
        while stretch and not self.spent:
            place = len(_calls(self.program)) - stretch
            while place >= 0 and not self.spent:
                self._try(_without(self.program, self.inputs, place, stretch))
                place = min(place, len(_calls(self.program))) - stretch
            stretch //= 2
        for move in (_fewer_outputs, _bypassed, _fewer_inputs):
            again = True
            while again and not self.spent:
                again = any(self._try(candidate) for candidate in move(self.program, self.inputs))
        return _size(self.program) < size

    def _try(self, candidate: _Candidate | None) -> bool:
        """Take `candidate` when it is smaller and fails."""
        if candidate is None or _size(candidate[0]) >= _size(self.program):
            return False
        text = str(candidate[0].graph)
        if text in self._asked_before:
            return False
        if self.asked >= self._most_calls or time.monotonic() > self._until:
            self.spent = True
            return False
        self._asked_before.add(text)
        if not self.ask(*candidate):
            return False
        self.program, self.inputs = candidate
        if self._progress is not None:
            self._progress(len(_calls(self.program)), self.asked)
        return True


_Candidate = tuple[ExportedProgram, dict[str, Tensor]]


def _calls(program: ExportedProgram) -> list[Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _size(program: ExportedProgram) -> tuple[int, int]:
    """Calls first; then what goes in and comes out."""
    ends = len(user_inputs(program)) + len(program.graph_signature.output_specs)
    return len(_calls(program)), ends


def _end_at(program: ExportedProgram, inputs: Mapping[str, Tensor], left_out: int) -> _Candidate | None:
    """Without the last `left_out` calls."""
    editor = Editor(program, BY)
    kept = _with_parts(editor.nodes()[:-left_out])
    alive = [node for node in kept if any(user not in kept for user in node.users)]
    return _ending(editor, alive, inputs)


def _begin_at(program: ExportedProgram, inputs: Mapping[str, Tensor], left_out: int) -> _Candidate | None:
    """Without the first `left_out` calls."""
    return _without(program, inputs, 0, left_out)


def _without(program: ExportedProgram, inputs: Mapping[str, Tensor], start: int, length: int) -> _Candidate | None:
    """Without `length` calls from `start` on: what others read of them becomes inputs."""
    editor = Editor(program, BY)
    cut = _with_parts(editor.nodes()[start : start + length])
    wanted = [node for node in cut if any(user not in cut for user in node.users)]
    if not all(_carried(node) for node in wanted):
        return None
    order = {node: place for place, node in enumerate(editor.graph.nodes)}
    values = _values(program, inputs, {node.name for node in wanted})
    now = dict(inputs)
    for node in wanted:
        value = values[node.name]
        carried = value.to(CARRIED[value.dtype]).contiguous()
        if not torch.equal(carried.to(value.dtype).nan_to_num(), value.nan_to_num()):
            return None  # an int64 that no int32 holds
        with editor.at(node):
            made = editor.add_input(f"{node.name}_value", carried)
        now[made.name] = carried
        readers = [user for user in node.users if user not in cut]
        with editor.at(min(readers, key=order.__getitem__)):
            new = made if carried.dtype == value.dtype else editor.call(aten.to.dtype, made, value.dtype)
        for user in readers:
            user.replace_input_with(node, new)
    return _finished(editor, now)


def _fewer_outputs(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> Iterator[_Candidate | None]:
    """One half of the outputs, then all but one."""
    (values,) = program.graph.output_node().args
    count = len(values)
    choices = [list(range(count // 2)), list(range(count // 2, count))] if count > 2 else []
    choices += [[kept for kept in range(count) if kept != place] for place in range(count)] if count > 1 else []
    for choice in choices:
        editor = Editor(program, BY)
        (nodes,) = editor.graph.output_node().args
        kept = [nodes[place] for place in choice]  # type: ignore[index]
        yield _ending(editor, [node for node in kept if isinstance(node, Node)], inputs)


def _bypassed(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> Iterator[_Candidate | None]:
    """Without one call that gives a tensor like one of its arguments."""
    for place in reversed(range(len(_calls(program)))):
        node = _calls(program)[place]
        for number, source in enumerate(node.all_input_nodes):
            if not _alike(node, source):
                continue
            editor = Editor(program, BY)
            mine = editor.nodes()[place]
            editor.replace(mine, mine.all_input_nodes[number])
            yield _finished(editor, dict(inputs))


def _fewer_inputs(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> Iterator[_Candidate | None]:
    """Without the inputs that nothing reads."""
    if any(not node.users for node in user_inputs(program)):
        editor = Editor(program, BY)
        yield _finished(editor, dict(inputs))


def _alike(node: Node, source: Node) -> bool:
    a, b = node.meta.get("val"), source.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


def _with_parts(nodes: Sequence[Node]) -> dict[Node, None]:
    """`nodes`, and the calls that pick one tensor of several from any of them."""
    parts = {user for node in nodes if not isinstance(node.meta.get("val"), Tensor) for user in node.users}
    return dict.fromkeys([*nodes, *sorted(parts - set(nodes), key=lambda node: node.name)])


def _carried(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in CARRIED


def _ending(editor: Editor, outputs: Sequence[Node], inputs: Mapping[str, Tensor]) -> _Candidate | None:
    """The program that returns `outputs`, cast to what a saved program may return."""
    if not outputs or not all(_carried(node) for node in outputs):
        return None
    with editor.at(editor.graph.output_node()):
        cast = [
            node
            if node.meta["val"].dtype in CARRIED.values()
            else editor.call(aten.to.dtype, node, CARRIED[node.meta["val"].dtype])
            for node in outputs
        ]
    editor.set_outputs(cast)
    return _finished(editor, dict(inputs))


def _finished(editor: Editor, inputs: dict[str, Tensor]) -> _Candidate | None:
    """The edited program, without calls and inputs that nothing reads any more; None when nothing is left of it."""
    for node in reversed(editor.nodes()):
        if not node.users:
            editor.graph.erase_node(node)
    unread = [node for node in editor.graph.nodes if node.op == "placeholder" and not node.users]
    for node in unread:
        if editor.value(node) is None and node.name in inputs:
            editor.drop_input(node)
    program = editor.finish()
    names = {node.name for node in user_inputs(program)}
    if not names or not _calls(program):
        return None
    return program, {name: value for name, value in inputs.items() if name in names}


def _values(program: ExportedProgram, inputs: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def watch(node: Node, value: object) -> None:
        if node.name in names and isinstance(value, Tensor):
            found[node.name] = value.clone()

    evaluate(program, inputs, watch)
    return found
