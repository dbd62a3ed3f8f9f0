"""What makes a graph compute as a plan says: quantize and dequantize ops, or weights that lie on their grid.

Run by `edgegen.graph.evaluate` the result is the fake-quant reference; backends that lower graphs lower it. A graph
that is to be float16 is made so first: scales and codes are then never rounded to float16 themselves, and values are
quantized from float16 and dequantized to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor
from edgegen.precision.arithmetic import by_row, by_tensor, int32_bias, out, static
from edgegen.precision.encode import Encoded, activation_qparams, encode_weight
from edgegen.precision.plan import COMPRESSED, ComponentPlan, OpPlan, Range
from edgegen.precision.sites import CONVS, channel_axis, resolve

aten, qd = torch.ops.aten, torch.ops.quantized_decomposed
_UPSAMPLINGS = (aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)


def quantized(program: ExportedProgram, ops: Mapping[str, OpPlan], *, by: str = "quantize") -> ExportedProgram:
    """`program` with what `ops` says of its calls, by name, in quantized_decomposed ops; calls keep their names.

    w8a8: inputs and the output (that of a relu which alone reads it) go through int8; w8a8-dynamic: inputs alone, with
    the range of each row of a linear's and of the whole tensor of a convolution's; both, and w8 of one scale an output
    channel: the weight is int8, dequantized. Other weights are put on their grid and stay float, as biases do.
    EdgegenError for a name that is not in the graph.
    """
    return _written(program, ops, by, on_grid_only=False)


def settled(canonical: ExportedProgram, plan: ComponentPlan, *, by: str = "settle") -> ExportedProgram:
    """The canonical graph with the weights of `plan` on their grid, so that every target's graph has the same codes.

    To be run before a target's passes: one that multiplies a weight then leaves its codes as they are. A convolution
    behind an upsampling, or one that reads a value twice, keeps its float weight: where a pass adds parts of it up, the
    sums are what is encoded.
    """
    ops = resolve(canonical, plan, canonical)
    calls = {node.name: node for node in canonical.graph.nodes}
    return on_grid(canonical, {name: op for name, op in ops.items() if not _may_be_added_up(calls[name])}, by=by)


def _may_be_added_up(node: Node) -> bool:
    source: Any = node.args[0]
    if source.target is aten.cat.default:
        return len(set(source.args[0])) < len(source.args[0])
    return source.target in _UPSAMPLINGS


def on_grid(program: ExportedProgram, ops: Mapping[str, OpPlan], *, by: str = "on-grid") -> ExportedProgram:
    """`program` in float, with the weights of `ops` replaced by what their codes stand for."""
    return _written(program, ops, by, on_grid_only=True)


def _written(program: ExportedProgram, ops: Mapping[str, OpPlan], by: str, *, on_grid_only: bool) -> ExportedProgram:
    editor = Editor(program, by)
    calls = {node.name: node for node in editor.nodes()}
    for name in ops:
        if name not in calls:
            raise EdgegenError(f"there is no call `{name}` to quantize")
    writer = _Writer(editor, on_grid_only)
    for name, node in calls.items():
        if name in ops and ops[name].precision in COMPRESSED:
            writer.write(node, ops[name])
    return editor.finish() if editor.changes else program


class _Writer:
    """The edits, op by op in the order of the graph; pairs and weights that several ops read are made once."""

    def __init__(self, editor: Editor, on_grid_only: bool) -> None:
        self._editor = editor
        self._on_grid_only = on_grid_only
        self._pairs: dict[tuple[Any, ...], Node] = {}
        self._weights: dict[tuple[Any, ...], Node] = {}

    def write(self, node: Node, op: OpPlan) -> None:
        given: list[Any] = list(node.args)
        if op.op != "matmul":
            given[1] = self._weight(node, op)
        if not self._on_grid_only and op.precision == "w8a8":
            assert op.input is not None
            given[0] = self._static(node, given[0], op.input)
            if op.op == "matmul":
                assert op.other is not None
                given[1] = self._static(node, given[1], op.other)
            elif len(given) > 2 and isinstance(given[2], Node):
                given[2] = self._bias(node, given[1], given[2], op.input)
        elif not self._on_grid_only and op.precision == "w8a8-dynamic":
            given[0] = self._dynamic(node, given[0], rows=node.target not in CONVS)
            if op.op == "matmul":
                given[1] = self._dynamic(node, given[1], rows=False)
        node.args = tuple(given)
        if not self._on_grid_only and op.precision == "w8a8" and op.output is not None:
            self._output(tail(node), op.output)

    def _weight(self, node: Node, op: OpPlan) -> Node:
        editor, weight = self._editor, node.args[1]
        value, axis = editor.value(weight), channel_axis(node)
        assert isinstance(weight, Node)
        if value is None:
            raise EdgegenError(f"the weight of `{node.name}` is computed, so it cannot be {op.precision}")
        integers = not self._on_grid_only and op.precision.startswith("w8") and op.form == "affine" and not op.group
        key = (weight, integers, op.precision.startswith("w8") or op.precision, op.form, op.group, axis)
        if key in self._weights:
            return self._weights[key]
        encoded = encode_weight(value, op, axis, name=str(weight.target).removeprefix("p_"))
        with editor.at(node):
            if integers:
                made = self._dequantized(node, encoded, value.dtype)
            else:
                made = editor.constant(encoded.decode().to(value.dtype), editor.named(node, "weight_on_grid"))
        self._weights[key] = made
        return made

    def _bias(self, node: Node, weight: Node, bias: Node, range: Range) -> Node:
        value, held = self._editor.value(bias), self._editor.value(weight.args[1])
        if value is None or held is None or weight.target is not qd.dequantize_per_channel.default:
            return bias
        with self._editor.at(node):
            return self._editor.constant(int32_bias(value, held, range), self._editor.named(node, "bias_int32"))

    def _dequantized(self, node: Node, encoded: Encoded, dtype: torch.dtype) -> Node:
        editor = self._editor
        assert encoded.scales is not None
        codes = editor.constant(encoded.codes, editor.named(node, "weight_int8"))
        scales = editor.constant(encoded.scales, editor.named(node, "weight_scales"))
        zeros = editor.constant(torch.zeros(len(encoded.scales), dtype=torch.int64), editor.named(node, "weight_zeros"))
        target, axis = qd.dequantize_per_channel.default, encoded.axis
        return editor.call(target, codes, scales, zeros, axis, -127, 127, torch.int8, **out(dtype))

    def _static(self, reader: Node, value: Node, range: Range) -> Node:
        """`value` through int8 of `range`; what comes out of the same int8 already is left."""
        scale, zero = activation_qparams(range)
        if value.target is qd.dequantize_per_tensor.default and value.args[1:3] == (scale, zero):
            return value
        key = (value, scale, zero)
        if key not in self._pairs:
            with self._editor.at(reader):
                self._pairs[key] = self._pair(value, scale, zero)
        return self._pairs[key]

    def _pair(self, value: Node, scale: float, zero: int) -> Node:
        made: Node = static(self._editor.call, value, scale, zero, value.meta["val"].dtype)
        return made

    def _output(self, value: Node, range: Range) -> None:
        scale, zero = activation_qparams(range)
        readers = list(value.users)
        with self._editor.at(value):
            pair = self._pair(value, scale, zero)
        codes: Any = pair.args[0]
        value.append(codes)
        codes.append(pair)
        for reader in readers:
            reader.replace_input_with(value, pair)

    def _dynamic(self, reader: Node, value: Node, *, rows: bool) -> Node:
        key = (value, rows)
        if key not in self._pairs:
            with self._editor.at(reader):
                dtype = value.meta["val"].dtype
                self._pairs[key] = (by_row if rows else by_tensor)(self._editor.call, value, dtype)
        return self._pairs[key]


def tail(node: Node) -> Node:
    """Where the output of a site leaves it: after a relu that alone reads it, which runtimes compute along with it."""
    if len(node.users) == 1:
        (reader,) = node.users
        if reader.target is aten.relu.default:
            return reader
    return node
