"""The precision plan in a TFLite file: ai-edge-quantizer's transformations with this project's scales and codes.

Which tensors are cut by QUANTIZE and DEQUANTIZE, which constants are shared and have to be copied, how four-bit codes
are packed: that is the quantizer's. Which scale each tensor has is the plan's: the quantizer is given a recipe that
answers per operator and an algorithm of our own that looks scales and codes up. So no calibrator runs, nothing is
skipped for a policy, and weights are encoded where every backend's are (`edgegen.precision.encode`), which also keeps
clear of the quantizer's way of rounding constants of more than 32 MiB (0.10.0 fails on those of rank four).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgegen.errors import EdgegenError, UsageError
from edgegen.lower.tflite_file import WEIGHT_INPUT, FileGraph, Place, in_file_order, places_of, weight_of
from edgegen.precision.plan import BITS, COMPRESSED, OpPlan, Precision

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Node

ALGORITHM = "edgegen_plan"
ACTIVATION_INPUT = {"TRANSPOSE_CONV": 2}
CHANNEL_AXIS = {"DEPTHWISE_CONV_2D": 3}
HALF = (*WEIGHT_INPUT, "EMBEDDING_LOOKUP")
"""Kinds whose weights can be float16 behind a DEQUANTIZE."""
INT8, INT4 = "INT8", "INT4"


@dataclass(frozen=True)
class QuantizedFile:
    """The file, and how many of its operators compute in int8 or hold compressed weights."""

    content: bytes
    int8_ops: Counter[str]
    compressed_weights: Counter[str]


def refuse_unrunnable(program: ExportedProgram, ops: Mapping[str, OpPlan]) -> None:
    """UsageError, naming the call, for a precision that LiteRT has no kernel for."""
    nodes = {node.name: node for node in program.graph.nodes}
    for name, op in ops.items():
        if op.precision not in COMPRESSED:
            continue
        reason = _refusal(nodes.get(name), op)
        if reason:
            raise UsageError(
                f"`{name}` cannot be {op.precision} in TFLite: {reason}",
                hint="give this op another precision in the plan, `w8a8` or `fp32` for instance",
            )


def _refusal(node: Node | None, op: OpPlan) -> str | None:
    if node is None:
        return "the graph has no such call"
    if op.form == "palette":
        return "LiteRT has no weights that are looked up in a table"
    if op.group:
        return "LiteRT's kernels take one scale an output channel for weights that are computed with in float"
    if node.meta["val"].ndim > 4 and op.op == "conv":
        return "LiteRT has no integer convolution over three axes"
    if op.op == "matmul" and op.precision == "w8a8-dynamic":
        return "LiteRT quantizes in each call only what meets a constant weight"
    return None


def quantize_file(
    content: bytes, program: ExportedProgram, ops: Mapping[str, OpPlan], float_precision: Precision = "fp32"
) -> QuantizedFile:
    """The float file of `program`, made by converting `marked(program, ops)`, with `ops` in their precisions.

    With `float_precision` fp16 the weights of all other operators that can hold them are cast to float16, but for those
    that `ops` keeps in fp32. EdgegenError for a planned call that the file does not have, or that does not run as
    planned in the result.
    """
    from ai_edge_quantizer import model_modifier, params_generator
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    planned = {name: op for name, op in ops.items() if op.precision in COMPRESSED}
    model = tfl_flatbuffer_utils.read_model(memoryview(content))
    graph = FileGraph(model)
    # What is as the rest of the component needs no place: the converter may do with it what it likes.
    every = places_of(graph, program, {name: op for name, op in ops.items() if op.precision != float_precision})
    places = {name: every[name] for name in planned}
    _register()
    # The scope that the quantizer asks with is made of all the outputs' names, each followed by a semicolon.
    recipe = _Recipe(
        {f"{places[name].output};": op for name, op in planned.items()},
        {f"{output};" for output in _in_half(graph, ops, every, float_precision)},
    )
    params = params_generator.ParamsGenerator(model).generate_quantization_parameters(
        recipe, _parameters(graph, program, planned, places), enable_progress_bar=False
    )
    made = bytes(model_modifier.ModelModifier(model).modify_model(params))
    return _read(made, planned, places)


def _in_half(
    graph: FileGraph, ops: Mapping[str, OpPlan], places: Mapping[str, Place], float_precision: Precision
) -> set[str]:
    """Outputs of the operators whose weights are cast to float16."""
    said = {place.output: ops[name].precision for name, place in places.items()}
    found = set()
    for _, kind, op in graph.operators():
        output = graph.name(int(op.outputs[0])) if len(op.outputs) else ""
        if kind in HALF and said.get(output, float_precision) == "fp16":
            found.add(output)
    return found


class _Recipe:
    """What the quantizer asks of each operator, by its scope: `ops` are planned, weights of `half` are cast."""

    def __init__(self, ops: Mapping[str, OpPlan], half: Collection[str]) -> None:
        self._ops = ops
        self._half = half

    def need_calibration(self) -> bool:
        return False

    def get_quantization_configs(self, kind: Any, scope: str) -> tuple[str, Any]:
        from ai_edge_quantizer import qtyping
        from ai_edge_quantizer.algorithm_manager import AlgorithmName

        op = self._ops.get(scope)
        if scope in self._half:
            cast = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
            config = qtyping.OpQuantizationConfig(weight_tensor_config=cast, explicit_dequantize=True)
            return AlgorithmName.FLOAT_CASTING, config
        if op is None:
            return AlgorithmName.NO_QUANTIZE, qtyping.OpQuantizationConfig()
        granularity = qtyping.QuantGranularity.CHANNELWISE
        weight = qtyping.TensorQuantizationConfig(num_bits=BITS[op.precision], granularity=granularity)
        activation = qtyping.TensorQuantizationConfig(num_bits=8, symmetric=False)
        return ALGORITHM, qtyping.OpQuantizationConfig(
            activation_tensor_config=activation if op.precision == "w8a8" else None,
            weight_tensor_config=weight,
            compute_precision=qtyping.ComputePrecision.INTEGER
            if op.precision.startswith("w8a8")
            else qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=not op.precision.startswith("w8a8"),
        )


def _register() -> None:
    """Make the quantizer know an algorithm whose scales are looked up, for every kind of planned operator."""
    from ai_edge_quantizer import algorithm_manager, qtyping
    from ai_edge_quantizer.algorithms.uniform_quantize import common_quantize, naive_min_max_quantize

    materialize = {
        "CONV_2D": common_quantize.materialize_fc_conv,
        "DEPTHWISE_CONV_2D": common_quantize.materialize_fc_conv,
        "FULLY_CONNECTED": common_quantize.materialize_fc_conv,
        "CONV_2D_TRANSPOSE": common_quantize.materialize_conv2d_transpose,
        "BATCH_MATMUL": common_quantize.materialize_batch_matmul,
    }
    for name, function in materialize.items():
        algorithm_manager.register_quantized_op(
            ALGORITHM,
            qtyping.TFLOperationName[name],
            naive_min_max_quantize.init_qsvs,
            calibration_func=naive_min_max_quantize.min_max_calibrate,
            materialize_func=partial(function, _looked_up),
        )


def _looked_up(op_info: Any, config: Any, content: Any = None, statistics: Any = None) -> Any:
    """The parameters that `_parameters` put where the quantizer keeps what it has observed of a tensor."""
    return statistics[op_info.subgraph_op_index]


def _parameters(
    graph: FileGraph, program: ExportedProgram, ops: Mapping[str, OpPlan], places: Mapping[str, Place]
) -> dict[str, dict[int, Any]]:
    """Tensor name -> operator that reads or gives it -> its parameters; weights come with their codes."""
    from edgegen.graph.edit import weights

    nodes = {node.name: node for node in program.graph.nodes}
    held = weights(program)
    operators = {index: op for index, _, op in graph.operators()}
    known: defaultdict[str, dict[int, Any]] = defaultdict(dict)
    for name, op in ops.items():
        place, operator = places[name], operators[places[name].index]
        if op.op != "matmul":
            tensor = int(operator.inputs[WEIGHT_INPUT[place.kind]])
            node = nodes[name]
            known[graph.name(tensor)][place.index] = _weight(
                node, weight_of(node, held), op, place, graph.shape(tensor)
            )
        if op.precision == "w8a8":
            first = ACTIVATION_INPUT.get(place.kind, 0)
            ranges = [(operator.inputs[first], op.input, place.factor), (operator.outputs[0], op.output, 1.0)]
            if op.op == "matmul":
                ranges.append((operator.inputs[1], op.other, 1.0))
            for tensor, span, factor in ranges:
                known[graph.name(int(tensor))][place.index] = _activation(span, factor)
    return dict(known)


def _activation(span: Any, factor: float) -> Any:
    """Of a tensor whose values are `span` divided by `factor`."""
    from ai_edge_quantizer import qtyping

    from edgegen.precision.encode import activation_qparams

    scale, zero_point = activation_qparams(span)
    return qtyping.UniformQuantParams(
        num_bits=8,
        quantized_dimension=None,
        scale=np.array([scale / factor], np.float32),
        zero_point=np.array([zero_point], np.int32),
        symmetric=False,
    )


def _weight(node: Node, weight: Tensor, op: OpPlan, place: Place, shape: tuple[int, ...]) -> Any:
    from ai_edge_quantizer import qtyping

    from edgegen.precision.encode import encode_weight
    from edgegen.precision.sites import channel_axis

    encoded = encode_weight(weight, op, channel_axis(node))
    assert encoded.scales is not None
    scales = encoded.scales.detach().cpu().numpy().astype(np.float64).reshape(-1) * place.factor
    axis = CHANNEL_AXIS.get(place.kind, 0)
    # The quantizer multiplies them with the input's scale and expects a weight's rank.
    ranked = scales.astype(np.float32).reshape([-1 if one == axis else 1 for one in range(len(shape))])
    return qtyping.UniformQuantParams(
        num_bits=BITS[op.precision],
        quantized_dimension=axis,
        scale=ranked,
        zero_point=np.zeros_like(ranked, np.int32),
        symmetric=True,
        quantized_data=in_file_order(node, encoded.codes).astype(np.int8).reshape(shape),
    )


def _read(content: bytes, ops: Mapping[str, OpPlan], places: Mapping[str, Place]) -> QuantizedFile:
    """Count what the file computes in int8 and holds compressed; EdgegenError for a planned operator that is not so."""
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    graph = FileGraph(tfl_flatbuffer_utils.read_model(memoryview(content)))
    by_output = {graph.name(int(op.outputs[0])): (kind, op) for _, kind, op in graph.operators() if len(op.outputs)}
    computed: Counter[str] = Counter()
    compressed: Counter[str] = Counter()
    wrong = []
    for name, op in ops.items():
        kind, operator = by_output.get(places[name].output, ("", None))
        found = _runs_as(graph, kind, operator)
        if found != op.precision:
            wrong.append(f"`{name}` is {found} where the plan says {op.precision}")
            continue
        if op.precision.startswith("w8a8"):
            computed[kind] += 1
        if op.op != "matmul":
            compressed[op.precision] += 1
    if wrong:
        raise EdgegenError(
            "\n    ".join([f"{len(wrong)} ops do not run in the TFLite file as they were planned:", *wrong[:8]]),
            hint="give these ops `fp32` in the plan, or install the ai-edge-quantizer that `edgegen doctor` names",
        )
    return QuantizedFile(content, computed, compressed)


def _runs_as(graph: FileGraph, kind: str, op: Any) -> str:
    """The precision that an operator of the file has, in the plan's words; "float compute" for none of them."""
    if op is None:
        return "not there"
    first = graph.type(int(op.inputs[ACTIVATION_INPUT.get(kind, 0)]))
    given = graph.type(int(op.outputs[0]))
    second = int(op.inputs[WEIGHT_INPUT.get(kind, 1)])
    if first == given == INT8:
        return "w8a8" if graph.type(second) == INT8 else "float compute"
    if graph.constant(second) is not None and graph.type(second) == INT8:
        return "w8a8-dynamic"
    source = graph.producer.get(second)
    if source is None or graph.kind(source) != "DEQUANTIZE":
        return "float compute"
    return {INT8: "w8", INT4: "w4"}.get(graph.type(int(source.inputs[0])), "float compute")
