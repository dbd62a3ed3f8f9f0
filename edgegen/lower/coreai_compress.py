"""The ops of a quantized graph in Core AI's own: `coreai::quantize`, `dequantize`, blockwise scales and tables.

They are torch ops that coreai-torch registers and its converter knows; codes are packed below a byte on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import coreai_torch._compression.custom_layers  # noqa: F401  (registers the ops)
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import UsageError
from edgegen.graph.edit import Editor
from edgegen.lower.stored_weight import WEIGHTED, StoredWeight
from edgegen.precision.plan import OpPlan

qd = torch.ops.quantized_decomposed
coreai: Any = torch.ops.coreai


def check_plan(quantized: Mapping[str, OpPlan]) -> None:
    """UsageError for the first op whose precision Core AI cannot hold."""
    for name, op in quantized.items():
        if op.precision == "w8a8-dynamic":
            raise UsageError(
                f"`{name}` is planned as w8a8-dynamic: Core AI quantizes with scales that are constants",
                hint="plan `w8a8`, whose ranges are calibrated, or `w8`",
            )


def compressed(program: ExportedProgram, stored: Mapping[str, StoredWeight]) -> ExportedProgram:
    """`program`, as `LowerRequest.quantized` has it, with Core AI's ops for everything that is compressed."""
    editor = Editor(program, "coreai-compress")
    rewriting = _Rewriting(editor)
    for node in editor.nodes():
        if node.name in stored and node.target in WEIGHTED:
            rewriting.weight(node, stored[node.name])
        elif node.target is qd.quantize_per_tensor.default:
            rewriting.quantize(node)
        elif node.target is qd.dequantize_per_tensor.default:
            rewriting.dequantize(node)
    return editor.finish()


class _Rewriting:
    """The edits; a scale, a zero point or a weight that several ops read is made once."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._scalars: dict[tuple[float, torch.dtype], Node] = {}
        self._weights: dict[tuple[str, int], Node] = {}

    def weight(self, node: Node, weight: StoredWeight) -> None:
        source = node.args[1]
        assert isinstance(source, Node)
        key = (source.name, id(weight))
        if key not in self._weights:
            with self._editor.at(node):
                self._weights[key] = self._expression(node, weight, source.meta["val"].dtype)
        node.update_arg(1, self._weights[key])
        self._editor.changes += 1

    def _expression(self, node: Node, weight: StoredWeight, dtype: torch.dtype) -> Node:
        editor, codes = self._editor, torch.from_numpy(weight.codes)
        if weight.scales is not None:
            data = editor.constant(codes, editor.named(node, "weight.quantized_data"))
            scale = editor.constant(torch.from_numpy(weight.scales).to(dtype), editor.named(node, "weight.scale"))
            kind: torch.dtype = getattr(torch, f"int{weight.bits}")
            return editor.call(coreai.constexpr_blockwise_shift_scale.default, data, scale, None, None, kind, None)
        assert weight.tables is not None
        # The converter tells the two apart by their names.
        indices = editor.constant(codes, editor.named(node, "weight.indices"))
        tables = torch.from_numpy(weight.tables)[..., None].to(dtype)
        lut = editor.constant(tables, editor.named(node, "weight.lut"))
        return editor.call(coreai.lut_to_dense.default, indices, lut, 0)

    def quantize(self, node: Node) -> None:
        value, scale, zero_point, low, high, kind = node.args
        assert isinstance(value, Node) and (low, high, kind) == (-128, 127, torch.int8)
        with self._editor.at(node):
            given = self._scalar(node, scale, value.meta["val"].dtype), self._scalar(node, zero_point, torch.int8)
            self._put(node, coreai.quantize.default, value, given[0], torch.int8, given[1], None, 0)

    def dequantize(self, node: Node) -> None:
        value, scale, zero_point, *_ = node.args
        with self._editor.at(node):
            given = self._scalar(node, scale, node.meta["val"].dtype), self._scalar(node, zero_point, torch.int8)
            self._put(node, coreai.dequantize.default, value, *given, None, 0, None, None)

    def _put(self, node: Node, target: Any, *args: Any) -> None:
        self._editor.replace(node, self._editor.call(target, *args))

    def _scalar(self, node: Node, value: Any, dtype: torch.dtype) -> Node:
        if (value, dtype) not in self._scalars:
            name = "zero_point" if dtype is torch.int8 else "scale"
            self._scalars[value, dtype] = self._editor.constant(
                torch.tensor(value, dtype=dtype), f"quantization.{name}"
            )
        return self._scalars[value, dtype]
