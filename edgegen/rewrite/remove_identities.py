"""Take out calls that change nothing: asserts, aliases, copies, reshapes and casts to what is there already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Pass, Rewritten, decline

aten = torch.ops.aten
ASSERTS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg)
COPIES = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
)
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten._unsafe_view.default,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """A call whose value is its argument's, shape and dtype included, gives way to its argument.

        %a = aten.to.dtype(%x, float32)       # %x is float32
        %b = aten.dropout(%a, 0.1, False)                               ->   %y = aten.relu(%x)
        %c = aten.view(%b, [1, 320, 64, 64])  # the shape of %b
        %y = aten.relu(%c)

    So does a squeeze of a dimension that is not one, which torch leaves alone and ONNX refuses.
    Also removed: asserts on shapes and dtypes, which held when the graph was captured and whose shapes are static.

    Declines
    1. a dropout that trains;
    2. any call that changes shape or dtype (no decline is recorded: it is no identity).
    """

    name: ClassVar[str] = "remove-identities"
    tolerance: ClassVar[float] = 0.0

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined = []
        modified = False
        for node in editor.nodes(*ASSERTS):
            editor.graph.erase_node(node)
            modified = True
        for node in editor.nodes(*COPIES, *RESHAPES, *CASTS):
            if node.target is aten.dropout.default and node.args[2]:
                declined.append(decline(node, "this dropout trains: export the module in eval mode"))
            elif isinstance(node.args[0], Node) and _same(node.args[0], node):
                node.replace_all_uses_with(node.args[0])
                editor.graph.erase_node(node)
                modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _same(source: Node, node: Node) -> bool:
    a, b = source.meta["val"], node.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype)
