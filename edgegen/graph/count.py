"""What a captured graph costs: parameters, multiply-accumulates, and how many of each op.

A MAC is one multiplication with the addition it feeds, as in `torch.utils.flop_counter` halved. Counted: convolutions
(grouped, transposed), matrix products and attention. Elementwise work, norms and softmax are not MACs. An op that
multiplies matrices and has no rule here is listed in `uncounted`, never silently left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

Shape = tuple[int, ...]


class GraphCount(BaseModel):
    """Counts over one graph; `ops` and `macs_by_op` are by ATen name without overload, the most frequent first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int
    parameter_bytes: int
    macs: int
    ops: dict[str, int]
    macs_by_op: dict[str, int]
    uncounted: dict[str, int] = {}


def count(program: ExportedProgram) -> GraphCount:
    """Count `program`: tied parameters once, batch as captured. Shapes must be static."""
    names = set(program.graph_signature.parameters)
    tensors = {
        _identity(tensor): tensor for name, tensor in program.state_dict.items() if name in names and tensor.numel()
    }
    ops: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    uncounted: Counter[str] = Counter()
    for node in _calls(program.graph_module):
        name = op_name(node)
        ops[name] += 1
        if name in _RULES:
            macs[name] += _RULES[name](node)
        elif name in _PRODUCTS_WITHOUT_RULE:
            uncounted[name] += 1
    return GraphCount(
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        parameter_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        macs=sum(macs.values()),
        ops=_ranked(ops),
        macs_by_op=_ranked(macs),
        uncounted=_ranked(uncounted),
    )


def macs_of(node: Node) -> int:
    """Of one call; 0 for what is no product of matrices."""
    rule = _RULES.get(op_name(node))
    return 0 if rule is None else rule(node)


def op_name(node: Node) -> str:
    """`aten.conv2d` for a call of `aten.conv2d.default`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return str(getattr(target, "__name__", target))


def _calls(module: GraphModule) -> Iterator[Node]:
    """Calls of ops in a graph and in the graphs it nests (branches, autocast regions)."""
    for node in module.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") != "getitem":
            yield node
    for _, child in module.named_children():
        if isinstance(child, GraphModule):
            yield from _calls(child)


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    # Tied weights share storage, and views of one storage may be different parameters.
    if tensor.device.type == "meta":
        return (id(tensor),)
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _ranked(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _argument(node: Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _shape_of(value: Any) -> Shape:
    return tuple(int(size) for size in value.meta["val"].shape)


def _conv(node: Node) -> int:
    """Weight is [out, in / groups, *kernel]: every output value takes `in / groups * kernel` MACs."""
    return math.prod(_shape_of(node)) * math.prod(_shape_of(node.args[1])[1:])


def _conv_transposed(node: Node) -> int:
    """Weight is [in, out / groups, *kernel]: every input value feeds `out / groups * kernel` MACs."""
    return math.prod(_shape_of(node.args[0])) * math.prod(_shape_of(node.args[1])[1:])


def _convolution(node: Node) -> int:
    return _conv_transposed(node) if _argument(node, 6, "transposed") else _conv(node)


def _linear(node: Node) -> int:
    return math.prod(_shape_of(node)) * _shape_of(node.args[1])[-1]


def _product(first: int) -> Callable[[Node], int]:
    """A matrix product whose left operand is argument `first`; its last axis is what is summed over."""

    def rule(node: Node) -> int:
        return math.prod(_shape_of(node)) * _shape_of(node.args[first])[-1]

    return rule


def _attention(node: Node) -> int:
    """q [..., L, E], k [..., S, E], v [..., S, V]: L * S * (E + V) for every head."""
    query, key, value = (_shape_of(node.args[index]) for index in range(3))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_RULES: dict[str, Callable[[Node], int]] = {
    **dict.fromkeys(("aten.conv1d", "aten.conv2d", "aten.conv3d"), _conv),
    **dict.fromkeys(("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"), _conv_transposed),
    "aten.convolution": _convolution,
    "aten.linear": _linear,
    **dict.fromkeys(("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot"), _product(0)),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm", "aten.addmv"), _product(1)),
    **dict.fromkeys(
        (
            "aten.scaled_dot_product_attention",
            "aten._scaled_dot_product_flash_attention_for_cpu",
            "aten._scaled_dot_product_efficient_attention",
            "aten._scaled_dot_product_flash_attention",
        ),
        _attention,
    ),
}
_PRODUCTS_WITHOUT_RULE = frozenset(
    {
        "aten.einsum",
        "aten.bilinear",
        "aten.addbmm",
        "aten.tensordot",
        "aten.inner",
        "aten.lstm",
        "aten.gru",
        "aten.rnn_tanh",
        "aten.rnn_relu",
        "aten._native_multi_head_attention",
        "aten._convolution",
        "aten._int_mm",
        "aten._weight_int8pack_mm",
        "aten._weight_int4pack_mm",
    }
)
