"""Dynamic int8 as XNNPACK has it: 1x1 convolutions take a range for each pixel.

XNNPACK computes a convolution of one pixel with a stride of one as a fully connected layer over the pixels, and ranges
that are taken when it runs are those of a fully connected layer then: one a row (measured with ai-edge-litert 2.3.0 and
ExecuTorch 1.4.1, where the graph that this gives is matched to 140 dB and one range a picture to 42 dB). Other
convolutions have one range for the whole tensor.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node


def pointwise_rows(program: ExportedProgram) -> ExportedProgram:
    """A graph of `edgegen.precision.quantize.quantized` with its 1x1 convolutions as XNNPACK runs them.

    For the reference of an artifact that XNNPACK executes, not for lowering. Only conv2d calls without padding, groups
    or a stride whose input is quantized by a range of its own are changed.
    """
    import torch

    from edgegen.graph.edit import Editor

    aten, qd = torch.ops.aten, torch.ops.quantized_decomposed
    codes = (-128, 127, torch.int8)
    editor = Editor(program, "pointwise-rows")
    for node in editor.nodes(aten.conv2d.default):
        given: Any = node.args[0]
        if given.target is not qd.dequantize_per_tensor.tensor or not _pointwise(node):
            continue
        value = given.args[0].args[0]
        with editor.at(node):
            pixels = editor.call(aten.permute.default, value, [0, 2, 3, 1])
            chosen = editor.call(qd.choose_qparams_per_token_asymmetric.default, pixels, torch.int8)
            scale, zero = (editor.call(operator.getitem, chosen, place) for place in (0, 1))
            whole = editor.call(qd.quantize_per_token.default, pixels, scale, zero, *codes)
            rows = editor.call(qd.dequantize_per_token.default, whole, scale, zero, *codes, value.meta["val"].dtype)
            back = editor.call(aten.permute.default, rows, [0, 3, 1, 2])
        node.args = (back, *node.args[1:])
    return editor.finish() if editor.changes else program


def _pointwise(node: Node) -> bool:
    weight: Any = node.args[1]
    stride, padding, groups = ([*node.args, *_DEFAULTS[len(node.args) :]][place] for place in (3, 4, 6))
    spread: tuple[Any, ...] = (stride, padding)
    whole = [set(one) if isinstance(one, list | tuple) else {one} for one in spread]
    return tuple(weight.meta["val"].shape[2:]) == (1, 1) and whole == [{1}, {0}] and groups == 1


_DEFAULTS: tuple[Any, ...] = (None, None, None, 1, 0, 1, 1)
"""Of conv2d's arguments."""
