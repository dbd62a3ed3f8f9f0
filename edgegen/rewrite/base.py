"""What a pass is: a frozen dataclass whose fields are its options, with `requires`, `call` and `ensures`."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError
from edgegen.graph.count import op_name
from edgegen.graph.edit import Editor, made_by, module_path
from edgegen.graph.pattern import Match, Op, match


class PassError(EdgegenError):
    """A pass was given a graph it must not see, or left one that breaks its promise: a defect of the compiler."""


class Decline(BaseModel):
    """A near-miss: a node that a pass looked at and left as it was, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: str
    op: str
    module: str
    reason: str


@dataclass(frozen=True)
class Rewritten:
    """What a pass gave: `modified` says whether anything changed, `declined` what nearly did."""

    program: ExportedProgram
    modified: bool
    declined: tuple[Decline, ...] = ()


class Pass(ABC):
    """One rewrite. Subclasses are frozen dataclasses; fields are options with JSON values.

    `after` names passes that must come earlier when both are in a pipeline, `needs` passes that must be there, earlier.
    `tolerance` bounds the relative error (max |a - b| / max |a|) of one application on fp32; 0 promises the same bits.
    `removes` names ops that must not be left (where `ensures` is not overridden).
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[float] = 1e-5
    removes: ClassVar[tuple[Any, ...]] = ()
    changes_signature: ClassVar[bool] = False

    def requires(self, program: ExportedProgram) -> None:  # noqa: B027 (most passes take any graph)
        """PassError when `program` is none this pass may be given."""

    @abstractmethod
    def call(self, program: ExportedProgram) -> Rewritten:
        """Rewrite `program`, which stays as it is. EdgegenError for options that do not fit it."""

    def ensures(self, before: ExportedProgram, result: Rewritten) -> None:
        """PassError when the result breaks what every pass promises, or what this one does."""
        check_promises(self, before, result)

    def equivalent_inputs(self, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs at which the graph before and the result must agree, as near to `given` as this pass allows.

        A pass that changes the signature says here which inputs its result takes instead, and where it holds.
        """
        return dict(given), dict(given)

    def __call__(self, program: ExportedProgram) -> Rewritten:
        self.requires(program)
        result = self.call(program)
        self.ensures(program, result)
        return result

    def __str__(self) -> str:
        """`name{option=json, ...}`, options at their default left out; `edgegen.rewrite.registry.parse` reads it."""
        said = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or value != field.default:
                said.append(f"{field.name}={json.dumps(value)}")
        return f"{self.name}{{{', '.join(said)}}}" if said else self.name


class RulePass(Pass):
    """A pass made of one rule: pattern, check, rewrite. Runs until nothing matches any more.

    `rewrite` is called inside `editor.at(match.root)` and returns the node that takes the root's place.
    """

    @abstractmethod
    def pattern(self) -> Op | tuple[Op, ...]:
        """What to look for; of several patterns the first that matches a node is taken."""

    def check(self, found: Match, editor: Editor) -> str | None:
        """Why this match is left as it is, or None."""
        return None

    @abstractmethod
    def rewrite(self, found: Match, editor: Editor) -> Node: ...

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        patterns = self.pattern()
        patterns = patterns if isinstance(patterns, tuple) else (patterns,)
        declined: dict[str, Decline] = {}
        modified, again = False, True
        while again:
            again = False
            for node in editor.nodes():
                if node.graph is not editor.graph or (not node.users and node.op == "call_function"):
                    continue
                found = next((one for pattern in patterns if (one := match(pattern, node)) is not None), None)
                if found is None:
                    continue
                reason = self.check(found, editor)
                if reason is not None:
                    declined[node.name] = decline(node, reason)
                    continue
                with editor.at(node):
                    new = self.rewrite(found, editor)
                editor.replace(node, new)
                modified = again = True
            if again:
                editor.sweep()
        if not modified:
            return Rewritten(program, False, tuple(declined.values()))
        return Rewritten(editor.finish(), True, tuple(declined.values()))


def decline(node: Node, reason: str) -> Decline:
    """A near-miss at `node`."""
    return Decline(node=node.name, op=op_name(node), module=module_path(node), reason=reason)


def census(program: ExportedProgram) -> Counter[str]:
    """How many calls of each op, `getitem` left out."""
    calls = (node for node in program.graph.nodes if node.op == "call_function")
    names = Counter(op_name(node) for node in calls)
    del names["getitem"]
    return names


def check_promises(one: Pass, before: ExportedProgram, result: Rewritten) -> None:
    """Structure, signature, outputs, provenance and removed ops of a result; PassError names the first breach."""
    program = result.program
    if not result.modified:
        if program is not before:
            raise PassError(f"pass `{one}` says that it changed nothing and returns another graph")
        return
    program.graph.lint()
    if not one.changes_signature and _inputs(program) != _inputs(before):
        raise PassError(f"pass `{one}` changed the inputs from {_inputs(before)} to {_inputs(program)}")
    if _outputs(program) != _outputs(before):
        raise PassError(f"pass `{one}` changed the outputs from {_outputs(before)} to {_outputs(program)}")
    known = {(node.name, node.target) for node in before.graph.nodes}
    for node in program.graph.nodes:
        if node.op in ("call_function", "placeholder"):
            if node.meta.get("val") is None and "val" not in node.meta:
                raise PassError(f"pass `{one}` left `{node.name}` without a shape")
            if node.op == "call_function" and (node.name, node.target) not in known and one.name not in made_by(node):
                raise PassError(f"pass `{one}` made `{node.name}` without saying so")
        if node.op == "call_function" and node.target in one.removes and not _declined(node, result.declined):
            raise PassError(f"pass `{one}` left a `{op_name(node)}`: `{node.name}`")


def _declined(node: Node, declined: Sequence[Decline]) -> bool:
    return any(one.node == node.name for one in declined)


def _inputs(program: ExportedProgram) -> list[tuple[str, tuple[int, ...], str]]:
    names = set(program.graph_signature.user_inputs)
    return [
        (node.name, tuple(node.meta["val"].shape), str(node.meta["val"].dtype))
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    ]


def _outputs(program: ExportedProgram) -> list[Any]:
    values: Any = program.graph.output_node().args[0]
    return [
        (tuple(v.meta["val"].shape), str(v.meta["val"].dtype)) if isinstance(v, Node) else repr(v)  # None, a number
        for v in values
    ]
