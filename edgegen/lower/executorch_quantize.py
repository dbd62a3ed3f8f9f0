"""The precision plan in an ExecuTorch program: what XNNPACK takes in int8, and a look into the file that it is so.

The graph that is lowered carries quantize and dequantize ops already; XNNPACK's partitioner takes a convolution or
linear together with those around it. What it serialised is read back from the `.pte`, delegate by delegate: each value
of an XNNPACK graph has a datatype, and an op runs in int8 when its input, weight and output are integers, or, with
ranges that are taken when it runs, when its input and weight are. Which op of the plan it is its weight says: ops have
no names in the file, but the codes and scales of each are there.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgegen.errors import EdgegenError, UsageError
from edgegen.precision.plan import COMPRESSED, OpPlan, OpPrecision, Precision

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

    from edgegen.lower.stored_weight import StoredWeight

GEMMS = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected")
CODES = ("xnn_datatype_qint8",)
WEIGHT_CODES = ("xnn_datatype_qcint8", "xnn_datatype_qint8")
DYNAMIC_CODES = ("xnn_datatype_qdint8", "xnn_datatype_qpint8")


@dataclass(frozen=True)
class DelegateOp:
    """A convolution or linear of a delegate: its arithmetic, in a plan's words or "float compute", and its weight."""

    kind: str
    arithmetic: str
    codes: bytes
    """Sorted: XNNPACK keeps them in an order of its own. Empty for what the file holds elsewhere, as float weights."""
    scales: bytes
    """float32, one for each output channel in order."""


@dataclass(frozen=True)
class DelegateOps:
    """Convolutions and linears of all XNNPACK delegates in a file: kind -> how many in each arithmetic."""

    static: Counter[str]
    dynamic: Counter[str]
    floating: Counter[str]
    each: tuple[DelegateOp, ...] = ()

    @property
    def int8(self) -> Counter[str]:
        return self.static + self.dynamic


def refuse_unrunnable(program: ExportedProgram, ops: Mapping[str, OpPlan], float_precision: Precision) -> None:
    """UsageError, naming the call, for a precision that XNNPACK under ExecuTorch does not execute."""
    nodes = {node.name: node for node in program.graph.nodes}
    for name, op in ops.items():
        if op.precision not in COMPRESSED:
            continue
        if float_precision == "fp16":
            raise UsageError(
                f"`{name}` cannot be {op.precision} in ExecuTorch beside float16: what XNNPACK's delegate makes of "
                "int8 ops between float16 values runs and is noise (measured, ExecuTorch 1.4.1)",
                hint='give this component `float_precision = "fp32"` in the plan',
            )
        if name not in nodes:
            raise EdgegenError(f"the plan has `{name}`, which is no call of the graph")
        reason = _refusal(nodes[name], op)
        if reason:
            raise UsageError(
                f"`{name}` cannot be {op.precision} in ExecuTorch: {reason}",
                hint="give this op another precision in the plan, `w8a8` for a convolution or linear, or `fp32`",
            )


def _refusal(node: Node, op: OpPlan) -> str | None:
    import torch

    aten = torch.ops.aten
    if op.precision in ("w8", "w6", "w4"):
        return "neither XNNPACK nor the runtime of the wheel has an op that unpacks weights for float arithmetic"
    if op.op == "matmul":
        return "XNNPACK multiplies two computed matrices in int8 only when one has a scale for each column"
    rank = node.meta["val"].ndim
    if op.op == "conv" and rank == 5:
        return "XNNPACK has convolutions over one and two axes"
    groups = node.args[6] if len(node.args) > 6 else 1
    transposed = node.target not in (aten.conv1d.default, aten.conv2d.default, aten.linear.default)
    if op.op == "conv" and transposed and isinstance(groups, int) and groups > 1:
        return "XNNPACK's transposed convolutions take one scale an output channel only without groups"
    if op.op == "conv" and op.precision == "w8a8-dynamic":
        return "ExecuTorch's dynamic convolutions give wrong numbers or crash where one follows another"
    return None


def one_dequantize_a_reader(program: ExportedProgram) -> ExportedProgram:
    """`program` in which no two calls read the same dequantized value: each has a dequantize of its own.

    XNNPACK's layout pass (`ChannelsLastTaggedReshapePass.insert_copy_q_dq`, ExecuTorch 1.4.1) turns a dequantized value
    to the layout that one reader wants and hands the result to all its readers, also to those that it has seen to
    before and that want the other layout. Where their shapes then disagree the delegate fails when it runs
    (`xnn_status_invalid_parameter`), where they happen to agree the numbers are wrong. With one reader each there is
    nobody else to hand it to, and the partitioner cuts fewer pieces.
    """
    import torch

    from edgegen.graph.edit import Editor

    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    editor = Editor(program, "one-dequantize-a-reader")
    for node in editor.nodes(dequantize):
        for reader in list(node.users)[1:]:
            with editor.at(node):
                own = editor.call(dequantize, *node.args, **node.kwargs)
            reader.replace_input_with(node, own)
    return editor.finish() if editor.changes else program


def misshapen(graph: Mapping[str, Any]) -> list[str]:
    """Nodes of an XNNPACK graph whose values have no shapes that fit each other, in words."""
    shapes = {tensor["id_out"]: tensor["dims"] for tensor in _tensors(graph)}
    found = []
    for node in graph["xnodes"]:
        kind, ids = node["xnode_union_type"], node["xnode_union"]
        if kind not in ("XNNAdd", "XNNSubtract", "XNNMultiply", "XNNDiv"):
            continue
        first, second, made = (tuple(shapes[ids[key]]) for key in ("input1_id", "input2_id", "output_id"))
        try:
            fits = np.broadcast_shapes(first, second) == made
        except ValueError:
            fits = False
        if not fits:
            found.append(f"{kind} of {list(first)} and {list(second)} giving {list(made)}")
    return found


def delegate_ops(content: bytes) -> DelegateOps:
    """Count the convolutions and linears in the delegates of a `.pte`, by the datatypes of what they read and give."""
    held = _named_data(content)
    each = []
    for graph in xnnpack_graphs(content):
        if wrong := misshapen(graph):
            raise EdgegenError(
                "\n    ".join([f"{len(wrong)} ops of an XNNPACK delegate do not fit their values:", *wrong[:8]]),
                hint="plan the ops around them as `fp32`; this is a defect of ExecuTorch's layout pass",
            )
        types, weights = _datatypes(graph), _weights(graph, held)
        for node in graph["xnodes"]:
            kind, ids = node["xnode_union_type"], node["xnode_union"]
            if kind not in GEMMS:
                continue
            given, weight, made = (types.get(ids[key], "") for key in ("input1_id", "filter_id", "output_id"))
            arithmetic = "float compute"
            if weight in WEIGHT_CODES and given in CODES and made in CODES:
                arithmetic = "w8a8"
            elif weight in WEIGHT_CODES and given in DYNAMIC_CODES:
                arithmetic = "w8a8-dynamic"
            each.append(DelegateOp(kind, arithmetic, *weights.get(ids["filter_id"], (b"", b""))))
    static, dynamic, floating = (Counter(one.kind for one in each if one.arithmetic == name) for name in _ARITHMETIC)
    return DelegateOps(static, dynamic, floating, tuple(each))


_ARITHMETIC = ("w8a8", "w8a8-dynamic", "float compute")


def _named_data(content: bytes) -> dict[str, bytes]:
    """What a `.pte` holds beside its program, by key."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    named = deserialize_pte_binary(content).named_data
    return {} if named is None else {key: bytes(named.buffers[at.buffer_index]) for key, at in named.pte_data.items()}


def _weights(graph: Mapping[str, Any], held: Mapping[str, bytes]) -> dict[int, tuple[bytes, bytes]]:
    """Codes, sorted, and scales of each int8 weight of a delegate, by the number of its value."""
    entries = graph["constant_data"]
    found = {}
    for value in graph["xvalues"]:
        tensor, scales = value["xvalue_union"], value["xvalue_union"].get("quant_params", {})
        if "num_scales" not in scales:
            continue
        places = tensor["tensor_value"]["constant_buffer_idx"], scales["scale_buffer_idx"]
        codes, numbers = (held.get(entries[at]["named_key"], b"") for at in places)
        found[tensor["tensor_value"]["id_out"]] = np.sort(np.frombuffer(codes, np.int8)).tobytes(), numbers
    return found


def check(
    content: bytes,
    edge: ExportedProgram,
    ops: Mapping[str, OpPlan],
    stored: Mapping[str, StoredWeight] | None = None,
) -> DelegateOps:
    """What runs in int8 in a file; EdgegenError when that is less than `ops` say.

    `edge` is the partitioned graph that the file was made of: what is left outside of delegates is named from it.
    `stored` are the ops' weights: each must be read by an op of its plan's arithmetic, not just by as many as planned.
    """
    found = delegate_ops(content)
    planned = Counter(op.precision for op in ops.values() if op.precision in COMPRESSED)
    short: dict[OpPrecision, int] = {
        "w8a8": planned["w8a8"] - found.static.total(),
        "w8a8-dynamic": planned["w8a8-dynamic"] - found.dynamic.total(),
    }
    left = outside(edge)
    if left:
        raise EdgegenError(
            "\n    ".join([f"{len(left)} ops keep float compute between quantize and dequantize:", *left[:8]]),
            hint="give these ops `fp32` in the plan",
        )
    wrong = [] if stored is None else _unlike(found.each, ops, stored)
    if wrong:
        raise EdgegenError(
            "\n    ".join([f"{len(wrong)} ops do not run in the ExecuTorch program as they were planned:", *wrong[:8]]),
            hint="give these ops `fp32` in the plan",
        )
    for precision, missing in short.items():
        if missing > 0:
            raise EdgegenError(
                f"{missing} of {planned[precision]} ops that are planned as {precision} run in float in the "
                f"ExecuTorch program: {_told(found.floating)}",
                hint="install the executorch that `edgegen doctor` names",
            )
    return found


def _unlike(each: Iterable[DelegateOp], ops: Mapping[str, OpPlan], stored: Mapping[str, StoredWeight]) -> list[str]:
    """Planned ops whose weight no op of that arithmetic reads, in words; ops of equal weights count each."""
    there = Counter((one.codes, one.scales, one.arithmetic) for one in each)
    wrong = []
    for name, weight in stored.items():
        assert weight.scales is not None  # palettes were refused
        codes, scales = np.sort(weight.codes, axis=None).tobytes(), weight.scales.reshape(-1).tobytes()
        key = (codes, scales, ops[name].precision)
        if there[key]:
            there[key] -= 1
            continue
        others = [one for one in _ARITHMETIC if there[codes, scales, one]]
        found = f"is read by an op in {others[0]}" if others else "is not in a delegate"
        wrong.append(f"`{name}` is planned as {ops[name].precision}, and its weight {found}")
    return wrong


def quantized_details(
    content: bytes, program: ExportedProgram, edge: ExportedProgram, ops: Mapping[str, OpPlan]
) -> dict[str, str]:
    """`int8_ops` and `compressed_weights` for `Lowered.details`, after `check`; nothing where nothing is planned.
    `program` is the graph that was lowered, `edge` what it was partitioned to."""
    from edgegen.lower.stored_weight import stored_weights

    planned = Counter(op.precision for op in ops.values() if op.precision in COMPRESSED)
    if not planned:
        return {}
    found = check(content, edge, ops, stored_weights(program, ops))
    return {"int8_ops": _told(found.int8), "compressed_weights": _told(planned)}


def outside(edge: ExportedProgram) -> list[str]:
    """Calls outside of delegates that multiply by weights which a dequantize gives, each by the module it came from.

    Such a call computes in float: the kernel library has no other. A delegate should have taken it with its weight.
    """
    from edgegen.graph.edit import module_path

    named = []
    for node in edge.graph.nodes:
        if node.op != "call_function" or not any(one in str(node.target) for one in _MULTIPLY):
            continue
        sources = [_before_transpose(source) for source in node.all_input_nodes]
        if any("dequantize_per_channel" in str(source.target) for source in sources):
            named.append(f"`{module_path(node) or node.name}` ({node.target})")
    return named


def _before_transpose(node: Node) -> Node:
    moves = any(one in str(node.target) for one in ("aten.permute", "aten.t_copy", "aten.transpose"))
    return node.all_input_nodes[0] if moves else node


_MULTIPLY = ("aten.conv", "aten.linear", "aten.addmm", "aten.mm", "aten.bmm", "aten.matmul")


def xnnpack_graphs(content: bytes) -> Iterator[dict[str, Any]]:
    """The graph of each XNNPACK delegate of a `.pte`, as its schema names things."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(content).program
    for plan in program.execution_plan:
        for delegate in plan.delegates:
            if delegate.id != "XnnpackBackend":
                continue
            payload = bytes(program.backend_delegate_data[delegate.processed.index].data)
            header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
            start = header.flatbuffer_offset
            yield _decompiled(payload[start : start + header.flatbuffer_size])


def _decompiled(flatbuffer: bytes) -> dict[str, Any]:
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    with tempfile.TemporaryDirectory(prefix="edgegen-xnnpack-") as name:
        folder = Path(name)
        schema, binary = folder / "schema.fbs", folder / "schema.bin"
        schema.write_bytes(_get_schema_bytes())
        binary.write_bytes(flatbuffer)
        _flatc_decompile(str(folder), str(schema), str(binary), ["--raw-binary"])
        text = (folder / "schema.json").read_text()
    # The end of a relu's range is written as `inf`, which is no JSON; Python reads `Infinity`.
    graph: dict[str, Any] = json.loads(re.sub(r"(?<=: )(-?)inf\b", r"\1Infinity", text))
    return graph


def _datatypes(graph: Mapping[str, Any]) -> dict[int, str]:
    return {tensor["id_out"]: tensor["datatype"] for tensor in _tensors(graph)}


def _tensors(graph: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"]
        yield tensor.get("tensor_value", tensor)


def _told(counter: Mapping[Any, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counter.items())) or "nothing"
