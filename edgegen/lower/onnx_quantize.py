"""A quantized graph in the forms that onnxruntime has integer kernels for, and a count of those that it took.

What was measured on an x86 CPU with VNNI, one thread, against float32 (QDQ as the exporter writes it in brackets):

    w8a8            QuantizeLinear / DequantizeLinear around Conv fuse to QLinearConv: 0.25 to 0.33 of the time from 320
                    channels on. Codes of activations are uint8: with int8 an output that several ops read stays float
                    [5 of 44 convolutions of a UNet]. A linear with a bias is MatMulIntegerToFloat, then the codes
                    of its output where the plan has them (one for onnxruntime alone has none) [fused from QDQ it is
                    QGemm between two Reshapes, which is slower: of the denoiser of `shapes` as a whole 3.22 against
                    2.97 ms]. A weight is stored as MatMul reads it: behind a Transpose it is transposed in every call.
    w8a8-dynamic    linears: range, scale and codes of each row in standard ops, then MatMulIntegerToFloat, then one
                    Gemm for zero points and bias: 0.31 to 0.52. DynamicQuantizeLinear has one range for the whole
                    tensor: 0.28 to 0.34 of the time, 6 to 9 dB worse. Convolutions: ConvInteger takes 3.5 times as
                    long as float32, so there is none.
    w8, w4          a linear becomes MatMulNBits, which by default multiplies int8 codes of blocks of each row: 0.76 to
                    1.2, some 60 dB beside float arithmetic. A convolution's weight is decoded in every call: 1.13 to
                    1.3. They save bytes.

Codes, scales and zero points are those of the graph: uint8 is int8 with both code and zero point 128 higher.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgegen.errors import EdgegenError, UsageError
from edgegen.lower.backend import LowerRequest
from edgegen.lower.onnx_fuse import CONTRIB
from edgegen.lower.onnx_optimised import optimised_graph
from edgegen.precision.plan import OpPlan

if TYPE_CHECKING:
    from torch.export import ExportedProgram

INTEGER = ("w8a8", "w8a8-dynamic")
INTEGER_OPS = frozenset(
    ["QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"]
)
BLOCKED_OPSET = 21
"""The first with four-bit integers and a scale for each block."""
_DYNAMIC = (
    "quantized_decomposed.dequantize_per_token.default",
    "quantized_decomposed.dequantize_per_tensor.tensor",
)
_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_EPSILON = np.float32(2.0**-23)
"""The least scale of a row, as in `edgegen.precision.quantize`."""


def refuse(request: LowerRequest) -> None:
    """UsageError when the plan has something that onnxruntime would emulate."""
    for name, op in request.quantized.items():
        reason = None
        if op.form == "palette":
            reason = "onnxruntime has no kernel for palettes"
        elif op.precision == "w8a8-dynamic" and op.op == "conv":
            reason = "onnxruntime's ConvInteger takes 3.5 times as long as float32"
        elif op.precision in INTEGER and request.precision == "fp16":
            reason = "onnxruntime's CPU provider has no integer kernel between float16 values"
        if reason is not None:
            raise UsageError(
                f"`{request.component}`: `{name}` cannot be {op.precision} ({op.form}) in ONNX: {reason}",
                hint="give the op another precision in the plan",
            )


def opset_for(request: LowerRequest, usual: int) -> int:
    """The operator set that the plan needs, `usual` where any does."""
    blocked = any(op.precision == "w4" or op.group for op in request.quantized.values())
    return max(usual, BLOCKED_OPSET) if blocked else usual


def without_dynamic_ranges(program: ExportedProgram) -> ExportedProgram:
    """`program` with float values where it quantizes by the range of each call: exporters do not know those ops, and
    `quantize_model` writes them for onnxruntime."""
    from edgegen.graph.edit import Editor

    if not any(str(node.target) in _DYNAMIC for node in program.graph.nodes):
        return program
    editor = Editor(program, "onnx-dynamic")
    for node in editor.nodes():
        if str(node.target) in _DYNAMIC:
            codes: Any = node.args[0]
            editor.replace(node, codes.args[0])
    return editor.finish()


def quantize_model(model: Any, values: Mapping[str, str], ops: Mapping[str, OpPlan]) -> None:
    """Rewrite an exported `onnx_ir.Model` in place; `values` are its values by the calls of the graph that they are.

    Each op of `ops` is named `site/<call>/`, so that it can be found among what onnxruntime fuses. EdgegenError when a
    call has no counterpart.
    """
    from onnx_ir.passes import common

    products = {name: _product(model, name, values) for name in ops}
    for name, product in products.items():
        product.name = _site(name)
    _store_as_read(model)
    _unsigned(model)
    for name, op in ops.items():
        if op.precision == "w8a8" and op.op == "linear":
            _static_linear(model, products[name], codes=op.output is not None)
        elif op.precision == "w8a8-dynamic":
            (_dynamic_product if op.op == "matmul" else _dynamic_linear)(model, products[name])
        elif op.precision in ("w4", "w8") and op.form == "affine" and (op.group or op.precision == "w4"):
            _blocked(model, products[name], op)
    if any(node.domain == CONTRIB for node in model.graph):
        model.graph.opset_imports[CONTRIB] = 1
    common.RemoveUnusedNodesPass()(model)


def check_integers(component: str, path: Path, ops: Mapping[str, OpPlan]) -> dict[str, str]:
    """How many ops onnxruntime computes in integers and how many weights are compressed in the file.

    EdgegenError names the ops that the plan wants in integers and onnxruntime computes in float.
    """
    planned = [name for name, op in ops.items() if op.precision in INTEGER]
    taken = {node.name for node in optimised_graph(path).node if node.op_type in INTEGER_OPS}
    missing = [name for name in planned if not any(one.startswith(_site(name)) for one in taken)]
    if missing:
        shown = ", ".join(f"`{name}`" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise EdgegenError(
            f"`{component}`: onnxruntime keeps float compute between quantize and dequantize in {len(missing)} of "
            f"{len(planned)} ops that the plan has in int8: {shown}",
            hint="give these ops another precision in the plan",
        )
    weighted = [name for name, op in ops.items() if op.op != "matmul" and op.precision not in ("fp32", "fp16")]
    held = _compressed(path)
    bare = [name for name in weighted if _site(name) not in held]
    if bare:
        raise EdgegenError(f"`{component}`: the weight of `{bare[0]}` is float in the file, and the plan compresses it")
    return {"int8_ops": str(len(planned)), "compressed_weights": str(len(weighted))}


def _site(name: str) -> str:
    return f"site/{name}/"


def _product(model: Any, name: str, values: Mapping[str, str]) -> Any:
    """The Conv, MatMul or Gemm that computes the call `name`, behind whose product only a bias may be added."""
    held = {value.name: value for node in model.graph for value in node.outputs}
    value = held.get(values.get(name, ""))
    for _ in range(4):
        node = None if value is None else value.producer()
        if node is None:
            break
        if node.op_type in _PRODUCTS:
            return node
        makers = [one for one in node.inputs if one is not None and one.producer() is not None]
        value = next((one for one in makers if _leads(one)), None)
    raise EdgegenError(f"`{name}` is not found again in the exported graph, so it cannot be quantized")


def _leads(value: Any) -> bool:
    return value.producer().op_type in (*_PRODUCTS, "Add", "Reshape", "Squeeze", "Unsqueeze")


def _constant(model: Any, name: str, array: Any, dtype: Any = None) -> Any:
    """The initializer `name`; two of one name are one."""
    import onnx_ir as ir

    if name not in model.graph.initializers:
        tensor = ir.tensor(array, dtype=dtype, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def _is_weight(node: Any) -> bool:
    return node is not None and node.op_type == "DequantizeLinear" and node.inputs[0].const_value is not None


def _store_as_read(model: Any) -> None:
    """Transpose(DequantizeLinear(codes)) -> DequantizeLinear(transposed codes): kernels want the weight itself."""
    import onnx_ir as ir

    for node in list(model.graph):
        weight: Any = node.inputs[0].producer() if node.op_type == "Transpose" else None
        if not _is_weight(weight):
            continue
        codes, order = weight.inputs[0], list(node.attributes["perm"].as_ints())
        array = np.ascontiguousarray(codes.const_value.numpy().transpose(order))
        stored = _constant(model, f"{codes.name}.{''.join(map(str, order))}", array)
        axis = order.index(weight.attributes["axis"].as_int() % len(order))
        made = ir.node("DequantizeLinear", [stored, *weight.inputs[1:]], attributes={"axis": axis})
        _replace(model, [node], [made])


def _unsigned(model: Any) -> None:
    """int8 codes of activations become uint8: code and zero point are both 128 higher."""
    import onnx_ir as ir

    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or _is_weight(node):
            continue
        zero = node.inputs[2].const_value
        if zero.dtype == ir.DataType.INT8:
            shifted = int(zero.numpy()) + 128
            node.replace_input_with(2, _constant(model, f"zero_point_{shifted}", np.array(shifted, np.uint8)))
            if node.op_type == "QuantizeLinear":
                node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)


class _Graph:
    """New nodes in a row, named after the op that they replace."""

    def __init__(self, model: Any, site: str) -> None:
        self.model, self.site = model, site
        self.nodes: list[Any] = []

    def call(self, op: str, *inputs: Any, outputs: int = 1, domain: str = "", name: str = "", **attributes: Any) -> Any:
        import onnx_ir as ir

        given = [self.constant(one) if isinstance(one, np.ndarray | np.generic) else one for one in inputs]
        own = name or f"{self.site}{len(self.nodes)}"
        node = ir.node(op, given, attributes=attributes, num_outputs=outputs, domain=domain, name=own)
        for place, value in enumerate(node.outputs):
            value.name = f"{own}:{place}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def constant(self, array: Any, suffix: str = "") -> Any:
        known = array.tobytes().hex() if array.size == 1 else f"{self.site}{len(self.nodes)}{suffix}"
        return _constant(self.model, f"constant/{array.dtype}/{array.ndim}/{known}", np.asarray(array))


def _replace(model: Any, old: list[Any], new: list[Any]) -> None:
    """`new` in the place of `old`: the last output of the one becomes that of the other, under the same name."""
    import onnx_ir as ir

    ends = [old[-1].outputs[0]], [new[-1].outputs[0]]
    ir.convenience.replace_nodes_and_values(model.graph, old[0], old, new, *ends)


def _static_linear(model: Any, product: Any, codes: bool) -> None:
    """x @ w + b in one kernel from the codes of x to float, which is quantized as the graph says. Without a bias it is
    left to onnxruntime where `codes` are wanted, which its QLinearMatMul gives."""
    bias, old = _bias(product)
    if bias is None and codes:
        return
    given, weight = product.inputs[0].producer(), product.inputs[1].producer()
    held = weight.inputs[0]
    if not _turned(product):
        turned = np.ascontiguousarray(held.const_value.numpy().T)
        held = _constant(model, f"{held.name}.10", turned)
    graph = _Graph(model, product.name)
    offset = None if bias is None else graph.constant(bias.astype(np.float32), ".bias")
    x, scale, zero = given.inputs
    name = f"{product.name}product"
    graph.call("MatMulIntegerToFloat", x, held, scale, weight.inputs[1], zero, None, offset, domain=CONTRIB, name=name)
    _replace(model, old, graph.nodes)


def _dynamic_linear(model: Any, product: Any) -> None:
    """x @ w + b with uint8 codes of each row: scale[r] * (codes @ w - zero[r] * sum(w)) + b."""
    weight = product.inputs[1].producer()
    codes, scales = weight.inputs[0].const_value.numpy(), weight.inputs[1].const_value.numpy()
    if not _turned(product):
        codes = np.ascontiguousarray(codes.T)
    features = len(codes)
    x = product.inputs[0]
    shape = [int(size) for size in product.outputs[0].shape]
    bias, old = _bias(product)
    graph = _Graph(model, product.name)
    call = graph.call
    rows = call("Reshape", x, np.array([-1, features])) if len(shape) != 2 else x
    last, zero = np.array([1]), np.float32(0)
    low = call("Min", call("ReduceMin", rows, last, keepdims=0), zero)
    high = call("Max", call("ReduceMax", rows, last, keepdims=0), zero)
    scale = call("Max", call("Div", call("Sub", high, low), np.float32(255)), _EPSILON)
    # From the side of the range whose end is the farther off, as `choose_qparams_per_token_asymmetric` has it.
    point = call("Clip", call("Round", call("Neg", call("Div", low, scale))), zero, np.float32(255))
    quantized = call("QuantizeLinear", rows, scale, call("Cast", point, to=2), axis=0)
    held = graph.constant(codes, ".codes")
    sums = call(
        "MatMulIntegerToFloat", quantized, held, np.float32(1), scales, domain=CONTRIB, name=f"{product.name}product"
    )
    column = call("Unsqueeze", scale, last)
    scaled = call("Mul", sums, column)
    total = -(codes.astype(np.float64).sum(0) * scales)
    if bias is None:
        left, right = call("Mul", call("Unsqueeze", point, last), column), total[None]
    else:
        offset = call("Mul", call("Unsqueeze", point, last), column)
        ones = np.ones((int(np.prod(shape[:-1])), 1), np.float32)
        left, right = call("Concat", offset, ones, axis=1), np.stack([total, bias.astype(np.float64)])
    out = call("Gemm", left, right.astype(np.float32), scaled)
    if len(shape) != 2:
        call("Reshape", out, np.array(shape))
    _replace(model, old, graph.nodes)


def _turned(product: Any) -> bool:
    """Whether the weight is stored as [inputs, outputs]."""
    flag = product.attributes.get("transB")
    return product.op_type == "MatMul" or (product.op_type == "Gemm" and not (flag is not None and flag.as_int()))


def _bias(product: Any) -> tuple[Any, list[Any]]:
    """The constant that is added to `product`, and the nodes that compute both."""
    if product.op_type == "Gemm":
        given = product.inputs[2] if len(product.inputs) > 2 else None
        return None if given is None else given.const_value.numpy(), [product]
    out = product.outputs[0]
    uses = list(out.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not out.is_graph_output():
        add = uses[0].node
        other = add.inputs[1 - uses[0].idx]
        if other.const_value is not None and len(other.shape) == 1:
            return other.const_value.numpy(), [product, add]
    return None, [product]


def _dynamic_product(model: Any, product: Any) -> None:
    """a @ b, each with one range: onnxruntime fuses this to MatMulIntegerToFloat."""
    graph = _Graph(model, product.name)
    call = graph.call
    a, a_scale, a_zero = call("DynamicQuantizeLinear", product.inputs[0], outputs=3)
    b, b_scale, b_zero = call("DynamicQuantizeLinear", product.inputs[1], outputs=3)
    sums = call("MatMulInteger", a, b, a_zero, b_zero, name=f"{product.name}product")
    call("Mul", call("Cast", sums, to=1), call("Mul", a_scale, b_scale))
    _replace(model, [product], graph.nodes)


def _blocked(model: Any, product: Any, op: OpPlan) -> None:
    """A float weight that lies on its grid becomes codes with a scale for each group of input channels."""
    import ml_dtypes
    import onnx_ir as ir
    import torch

    from edgegen.precision.encode import encode_weight

    held = product.inputs[1]
    assert held.const_value is not None
    array = held.const_value.numpy()
    turned = _turned(product)
    weight = torch.from_numpy(np.ascontiguousarray(array.T if turned else array))
    channels = 1 if product.op_type == "ConvTranspose" else 0
    encoded = encode_weight(weight, op, channels, name=held.name)
    assert encoded.scales is not None
    codes, scales = encoded.codes.numpy(), encoded.scales.float().numpy()
    if op.group:
        scales = scales.swapaxes(0, channels) if channels else scales
        scales = np.broadcast_to(
            scales.reshape(*scales.shape, *[1] * (codes.ndim - 2)), (*scales.shape, *codes.shape[2:])
        )
    if turned:
        codes, scales = codes.T, scales.T
    dtype = (ml_dtypes.int4, ir.DataType.INT4) if op.precision == "w4" else (np.int8, ir.DataType.INT8)
    stored = _constant(model, f"{held.name}.codes", np.ascontiguousarray(codes.astype(dtype[0])), dtype[1])
    factors = _constant(model, f"{held.name}.scales", np.ascontiguousarray(scales.astype(array.dtype)))
    own = 1 - channels if turned else channels
    places = {"axis": 1 - own, "block_size": op.group} if op.group else {"axis": own}
    made = ir.node("DequantizeLinear", [stored, factors], attributes=places)
    model.graph.insert_before(product, made)
    made.outputs[0].name = f"{product.name}weight"
    product.replace_input_with(1, made.outputs[0])


def _compressed(path: Path) -> set[str]:
    """Names of the ops whose weight is integers in the file."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    integers = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4)
    held = {value.name for value in graph.initializer if value.data_type in integers}
    decoded: set[str] = set()
    for node in graph.node:
        weight = node.op_type == "DequantizeLinear" and node.input[0] in held
        if weight or (node.op_type in ("Cast", "Transpose") and node.input[0] in decoded):
            decoded.add(node.output[0])
    named: Iterable[Any] = (node for node in graph.node if node.name.startswith("site/"))
    return {
        node.name[: node.name.index("/", len("site/")) + 1]
        for node in named
        if any(name in decoded or name in held for name in node.input[1:2])
    }
