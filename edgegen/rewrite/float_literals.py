"""Write whole-number literals beside float tensors as floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Pass, Rewritten

aten = torch.ops.aten
ARITHMETIC = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.maximum.default,
    aten.minimum.default,
)


@dataclass(frozen=True)
class FloatLiterals(Pass):
    """A whole number beside a float tensor is a float already; said so, no converter has to cast it.

        %y: f32[4] = aten.mul(%x, 3)      ->      %y: f32[4] = aten.mul(%x, 3.0)

    ExecuTorch makes a tensor of each literal, and a cast that XNNPACK does not take of each integer one.

    Declines nothing: arithmetic on integer tensors, and numbers that float32 does not hold, stay (no near-miss).
    """

    name: ClassVar[str] = "float-literals"
    tolerance: ClassVar[float] = 0.0

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        modified = False
        for node in editor.nodes(*ARITHMETIC):
            tensors = [one for one in node.args if isinstance(one, Node)]
            if not tensors or not all(one.meta["val"].is_floating_point() for one in tensors):
                continue
            args = tuple(float(one) if type(one) is int and abs(one) <= 2**24 else one for one in node.args)
            if any(type(old) is not type(new) for old, new in zip(node.args, args, strict=True)):
                with editor.at(node):
                    editor.replace(node, editor.call(node.target, *args, **node.kwargs))
                modified = True
        return Rewritten(editor.finish(), True) if modified else Rewritten(program, False)
