"""An input that is always the same becomes a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor, user_inputs
from edgegen.rewrite.base import Pass, Rewritten, decline


@dataclass(frozen=True)
class BindInput(Pass):
    """The input called `input` is taken out; everything reads the constant `value` instead.

        %scale: f32[1] = placeholder[guidance_scale]           ->    %scale: f32[1] = weight, 1.0 in it
        %y = aten.mul(%x, %scale)                                    %y = aten.mul(%x, %scale)

    `value` is one number for all elements, or all of them in order. `fold-constants` computes what follows from it.

    Declines
    1. (silently) a graph without such an input;
    2. an input that is an output: the graph would return a weight.

    EdgegenError when the number of values fits neither one element nor all.
    """

    input: str
    value: tuple[float, ...]

    name: ClassVar[str] = "bind-input"
    tolerance: ClassVar[float] = 0.0
    changes_signature: ClassVar[bool] = True

    def call(self, program: ExportedProgram) -> Rewritten:
        if not any(node.name == self.input for node in user_inputs(program)):
            return Rewritten(program, False)
        editor = Editor(program, self.name)
        node = next(one for one in editor.graph.nodes if one.name == self.input)
        if any(user.op == "output" for user in node.users):
            return Rewritten(program, False, (decline(node, "it is an output as well"),))
        if node.users:
            with editor.at(node):
                editor.replace(node, editor.constant(self._tensor(node), f"bound_{self.input}"))
        editor.drop_input(node)
        return Rewritten(editor.finish(), True)

    def equivalent_inputs(self, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The bound value before, nothing after."""
        if self.input not in given:
            return dict(given), dict(given)
        bound = self._filled(tuple(given[self.input].shape), given[self.input].dtype)
        return {**given, self.input: bound}, {name: one for name, one in given.items() if name != self.input}

    def _tensor(self, node: Node) -> Tensor:
        like = node.meta["val"]
        return self._filled(tuple(like.shape), like.dtype)

    def _filled(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = torch.tensor(self.value, dtype=torch.float64)
        count = torch.Size(shape).numel()
        if len(self.value) not in (1, count):
            raise EdgegenError(
                f"pass `{self.name}`: input `{self.input}` has {count} elements, {len(self.value)} values were given"
            )
        return values.expand(count).reshape(shape).to(dtype) if len(self.value) == 1 else values.view(shape).to(dtype)
