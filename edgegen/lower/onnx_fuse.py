"""What onnxruntime has one kernel for, and the exporter writes as several ops that it does not fuse by itself.

Measured on two x86 cores with onnxruntime 1.31, on the denoiser of `shapes` (12 attentions of 256 to 16 tokens, 25
group norms): what these save is what several small kernels take to be started, and three transposes an attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

CONTRIB = "com.microsoft"


def fuse(model: Any) -> None:
    """Rewrite an exported float32 `onnx_ir.Model` in place. What does not match is left as it is."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    found = False
    for node in list(model.graph):
        if node.op_type == "Softmax":
            found |= _attention(ir, node)
        elif node.op_type == "Mul":
            found |= _norm_affine(ir, model, node)
    if found:
        if any(node.domain == CONTRIB for node in model.graph):
            model.graph.opset_imports[CONTRIB] = 1
        common.RemoveUnusedNodesPass()(model)


def _attention(ir: Any, softmax: Any) -> bool:
    """Attention of one batch over tokens becomes MultiHeadAttention, which reads [1, tokens, channels] itself.

        %q = Transpose(Reshape(%a, [S, H, D]), [1, 0, 2])              # %a: [1, S, H * D]
        %k = Transpose(Reshape(%b, [T, H, D]), [1, 2, 0])
        %v = Transpose(Reshape(%c, [T, H, D]), [1, 0, 2])
        %m = MatMul(Softmax(MatMul(%q, %k)), %v)
        %y = Reshape(Transpose(%m, [1, 0, 2]), [1, S, H * D])
      ->
        %y = MultiHeadAttention(%a, %b, %c, num_heads=H, scale=1)

    Declines for a mask or a scale between the product and the softmax, another layout, and what is not float32.
    """
    scores = softmax.inputs[0].producer()
    (mixed,) = _readers(softmax, 1, "MatMul") or (None,)
    if scores is None or scores.op_type != "MatMul" or mixed is None or mixed.inputs[0] is not softmax.outputs[0]:
        return False
    axis = softmax.attributes.get("axis")
    if axis is not None and axis.as_int() not in (-1, 2):
        return False
    given = (scores.inputs[0], [1, 0, 2]), (scores.inputs[1], [1, 2, 0]), (mixed.inputs[1], [1, 0, 2])
    parts = [_heads(ir, value, order) for value, order in given]
    (turned,) = _readers(mixed, 1, "Transpose") or (None,)
    (whole,) = (_readers(turned, 1, "Reshape") or (None,)) if turned is not None else (None,)
    if None in parts or turned is None or whole is None or _order(turned) != [1, 0, 2]:
        return False
    (a, heads), (b, heads_b), (c, heads_c) = [one for one in parts if one is not None]
    if len({heads, heads_b, heads_c}) != 1 or _sizes(whole.outputs[0]) != [*_sizes(a)[:2], _sizes(c)[2]]:
        return False
    made = ir.node(
        "MultiHeadAttention",
        [a, b, c],
        attributes={"num_heads": heads, "scale": 1.0},
        domain=CONTRIB,
        name=f"{softmax.name}.attention",
    )
    _replace(ir, whole, [whole], made)
    return True


def _heads(ir: Any, value: Any, order: Sequence[int]) -> tuple[Any, int] | None:
    """What is taken apart into heads here, and into how many."""
    turned = value.producer()
    if turned is None or turned.op_type != "Transpose" or _order(turned) != order:
        return None
    apart = turned.inputs[0].producer()
    if apart is None or apart.op_type != "Reshape" or apart.inputs[0].dtype != ir.DataType.FLOAT:
        return None
    before, after = _sizes(apart.inputs[0]), _sizes(apart.outputs[0])
    if len(before) != 3 or len(after) != 3 or before != [1, after[0], after[1] * after[2]]:
        return None
    return apart.inputs[0], after[1]


def _norm_affine(ir: Any, model: Any, scale: Any) -> bool:
    """Scale and shift of each channel behind a group norm are one pass over its values instead of two.

        %n: [B, C, H, W] = Reshape(InstanceNormalization(...))
        %y = Add(Mul(%n, %scale), %shift)                              # both [C, 1, 1]
      ->
        %y = BatchNormalization(%n, %scale, %shift, mean=0, var=1, epsilon=0)

    Declines where the product is read elsewhere.
    """
    (shift,) = _readers(scale, 1, "Add") or (None,)
    if shift is None or scale.outputs[0].is_graph_output():
        return False
    value, factor = scale.inputs
    added = shift.inputs[1] if shift.inputs[0] is scale.outputs[0] else shift.inputs[0]
    shape = _sizes(value)
    if len(shape) != 4 or not _behind_norm(value) or value.dtype != ir.DataType.FLOAT:
        return False
    channels = shape[1]
    if any(one.const_value is None or _sizes(one)[-3:] != [channels, 1, 1] for one in (factor, added)):
        return False
    if any(one.const_value.numpy().size != channels for one in (factor, added)):
        return False
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    given = [
        _constant(ir, model, f"{factor.name}.{channels}", factor.const_value.numpy().reshape(-1)),
        _constant(ir, model, f"{added.name}.{channels}", added.const_value.numpy().reshape(-1)),
        _constant(ir, model, f"zeros/{channels}", zeros),
        _constant(ir, model, f"ones/{channels}", ones),
    ]
    made = ir.node("BatchNormalization", [value, *given], attributes={"epsilon": 0.0}, name=f"{scale.name}.affine")
    _replace(ir, shift, [scale, shift], made)
    return True


def _behind_norm(value: Any) -> bool:
    shaped = value.producer()
    if shaped is None or shaped.op_type != "Reshape":
        return False
    norm = shaped.inputs[0].producer()
    return norm is not None and norm.op_type == "InstanceNormalization"


def _readers(node: Any, count: int, op: str) -> tuple[Any, ...] | None:
    """Those of the one output of `node`, if they are `count` ops `op`."""
    readers = tuple(use.node for use in node.outputs[0].uses())
    return readers if len(readers) == count and all(one.op_type == op for one in readers) else None


def _order(turned: Any) -> list[int]:
    return list(turned.attributes["perm"].as_ints())


def _sizes(value: Any) -> list[int]:
    """[] where a size is not known."""
    if value.shape is None or not all(isinstance(size, int) for size in value.shape):
        return []
    return [int(size) for size in value.shape]


def _constant(ir: Any, model: Any, name: str, array: Any) -> Any:
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        model.graph.register_initializer(ir.Value(name=name, const_value=tensor, type=kind, shape=shape))
    return model.graph.initializers[name]


def _replace(ir: Any, last: Any, old: list[Any], made: Any) -> None:
    """`made` in the place of `old`, whose value and provenance it takes over from `last`."""
    made.metadata_props.update(last.metadata_props)
    ir.convenience.replace_nodes_and_values(last.graph, last, old, [made], [last.outputs[0]], [made.outputs[0]])
