"""Take inputs that nothing reads out of a graph's signature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.export import ExportedProgram

from edgegen.graph.edit import Editor, user_inputs
from edgegen.rewrite.base import Pass, Rewritten


@dataclass(frozen=True)
class DropUnusedInputs(Pass):
    """An input that no call reads is no input: an app should not have to make it, nor a runtime to copy it.

        %latent, %caption = placeholder            ->   %latent = placeholder
        %y = aten.convolution(%latent, ...)             %y = aten.convolution(%latent, ...)

    Declines nothing: what only dead calls read counts as unread. An input that is itself an output is read.
    """

    name: ClassVar[str] = "drop-unused-inputs"
    tolerance: ClassVar[float] = 0.0
    changes_signature: ClassVar[bool] = True

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        editor.sweep()
        names = {node.name for node in user_inputs(program)}
        unread = [node for node in editor.graph.nodes if node.name in names and not node.users]
        if not unread:
            return Rewritten(program, False)
        for node in unread:
            editor.drop_input(node)
        return Rewritten(editor.finish(), True)
