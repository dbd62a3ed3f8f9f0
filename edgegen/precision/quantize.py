"""What makes a graph compute as a plan says: quantize and dequantize ops, or weights that lie on their grid.

Run by `edgegen.graph.evaluate` the result is the fake-quant reference; backends that lower graphs lower it. A graph
that is to be float16 is made so first: scales and codes are then never rounded to float16 themselves, and values are
quantized from float16 and dequantized to it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

# Registers the ops; nothing of it is called.
import torch.ao.quantization.fx._decomposed
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor
from edgegen.precision.encode import ACTIVATION_MAX, ACTIVATION_MIN, Encoded, activation_qparams, encode_weight
from edgegen.precision.plan import COMPRESSED, ComponentPlan, OpPlan, Range
from edgegen.precision.sites import CONVS, channel_axis, resolve

aten, qd = torch.ops.aten, torch.ops.quantized_decomposed
_CODES = (ACTIVATION_MIN, ACTIVATION_MAX, torch.int8)
_UPSAMPLINGS = (aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)
_EPSILON = 2.0**-23
"""The least scale of a tensor whose range is taken when it is computed, as ExecuTorch has it."""


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
            assert op.input is not None and op.output is not None
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
        if not self._on_grid_only and op.precision == "w8a8":
            assert op.output is not None
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
        """`bias` as int8 arithmetic adds it: a whole number of the steps of its int32 sums, for each output channel.

        Less than a thousandth of an output's step, and still it is what makes runtimes round single codes otherwise
        than a float bias would, which a deep graph then carries on.
        """
        value, held = self._editor.value(bias), self._editor.value(weight.args[1])
        if value is None or held is None or weight.target is not qd.dequantize_per_channel.default:
            return bias
        step = held.double() * activation_qparams(range)[0]
        with self._editor.at(node):
            whole = ((value.double() / step).round() * step).to(value.dtype)
            return self._editor.constant(whole, self._editor.named(node, "bias_int32"))

    def _dequantized(self, node: Node, encoded: Encoded, dtype: torch.dtype) -> Node:
        editor = self._editor
        assert encoded.scales is not None
        codes = editor.constant(encoded.codes, editor.named(node, "weight_int8"))
        scales = editor.constant(encoded.scales, editor.named(node, "weight_scales"))
        zeros = editor.constant(torch.zeros(len(encoded.scales), dtype=torch.int64), editor.named(node, "weight_zeros"))
        target, axis = qd.dequantize_per_channel.default, encoded.axis
        return editor.call(target, codes, scales, zeros, axis, -127, 127, torch.int8, **_out(dtype))

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
        codes = self._editor.call(qd.quantize_per_tensor.default, value, scale, zero, *_CODES)
        out = _out(value.meta["val"].dtype)
        return self._editor.call(qd.dequantize_per_tensor.default, codes, scale, zero, *_CODES, **out)

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
                self._pairs[key] = self._by_row(value) if rows else self._by_tensor(value)
        return self._pairs[key]

    def _by_row(self, value: Node) -> Node:
        call = self._editor.call
        chosen = call(qd.choose_qparams_per_token_asymmetric.default, value, torch.int8)
        scale, zero = (call(operator.getitem, chosen, place) for place in (0, 1))
        codes = call(qd.quantize_per_token.default, value, scale, zero, *_CODES)
        return call(qd.dequantize_per_token.default, codes, scale, zero, *_CODES, value.meta["val"].dtype)

    def _by_tensor(self, value: Node) -> Node:
        call = self._editor.call
        chosen = call(qd.choose_qparams.tensor, value, *_CODES[:2], _EPSILON, torch.int8)
        scale, zero = (call(operator.getitem, chosen, place) for place in (0, 1))
        codes = call(qd.quantize_per_tensor.tensor, value, scale, zero, *_CODES)
        out = _out(value.meta["val"].dtype)
        return call(qd.dequantize_per_tensor.tensor, codes, scale, zero, *_CODES, **out)


def tail(node: Node) -> Node:
    """Where the output of a site leaves it: after a relu that alone reads it, which runtimes compute along with it."""
    if len(node.users) == 1:
        (reader,) = node.users
        if reader.target is aten.relu.default:
            return reader
    return node


def _out(dtype: torch.dtype) -> dict[str, Any]:
    """float32 is what the ops give unasked, and not every converter reads the argument."""
    return {} if dtype is torch.float32 else {"out_dtype": dtype}
