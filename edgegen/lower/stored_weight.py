"""Compressed weights as the plan has them, whole: what a backend writes into a file without deriving it again.

A backend whose `quantizes` is "graph" meets them in two forms (`LowerRequest.quantized`): as an int8 placeholder behind
`dequantize_per_channel`, or as a float placeholder that lies on the grid of its plan. Both are one `StoredWeight` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor, weights
from edgegen.precision.encode import encode_weight
from edgegen.precision.plan import COMPRESSED, OpPlan
from edgegen.precision.sites import CONVS, LINEAR, channel_axis

WEIGHTED = (*CONVS, LINEAR)
DEQUANTIZE_CHANNELS = torch.ops.quantized_decomposed.dequantize_per_channel.default


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """Whole numbers, and what makes them values: scales (affine, symmetric) or tables (palette).

    `codes`, int8 or uint8, has the shape of the weight. `scales` is float32 of the same rank, `tables` float32 of that
    rank and one more axis of 2^bits entries: one element, one table, for each block of codes, a block being what
    remains when an axis of the codes is divided by the blocks along it.
    """

    bits: int
    codes: NDArray[Any]
    scales: NDArray[np.float32] | None = None
    tables: NDArray[np.float32] | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many blocks there are along each axis."""
        if self.scales is not None:
            return self.scales.shape
        assert self.tables is not None
        return self.tables.shape[:-1]

    def value(self) -> NDArray[np.float32]:
        """The weight, float32: a code times its scale, rounded once, or the entry of its table."""
        if self.scales is not None:
            return np.asarray(self.codes.astype(np.float32) * _repeated(self.scales, self.codes.shape), np.float32)
        assert self.tables is not None
        tables = self.tables.reshape(-1, self.tables.shape[-1])
        numbers = _repeated(np.arange(len(tables)).reshape(self.blocks), self.codes.shape)
        return np.asarray(tables[numbers, self.codes], np.float32)

    @property
    def stored_bytes(self) -> int:
        """Codes packed, with scales or tables of two bytes each."""
        numbers = self.scales if self.scales is not None else self.tables
        assert numbers is not None
        return -(-self.codes.size * self.bits // 8) + 2 * numbers.size

    def transposed(self) -> StoredWeight:
        """Of a matrix, its transpose."""
        scales = None if self.scales is None else np.ascontiguousarray(self.scales.T)
        tables = None if self.tables is None else np.ascontiguousarray(self.tables.transpose(1, 0, 2))
        return StoredWeight(self.bits, np.ascontiguousarray(self.codes.T), scales, tables)

    def reshaped(self, shape: tuple[int, ...]) -> StoredWeight:
        """With axes of length 1 put in or left out. ValueError for any other shape."""
        if [one for one in shape if one != 1] != [one for one in self.codes.shape if one != 1]:
            raise ValueError(f"{list(self.codes.shape)} is not {list(shape)} but for axes of length 1")
        kept = iter(blocks for blocks, size in zip(self.blocks, self.codes.shape, strict=True) if size != 1)
        blocks = tuple(1 if size == 1 else next(kept) for size in shape)
        scales = None if self.scales is None else self.scales.reshape(blocks)
        tables = None if self.tables is None else self.tables.reshape(*blocks, self.tables.shape[-1])
        return StoredWeight(self.bits, self.codes.reshape(shape), scales, tables)


def stored_weights(program: ExportedProgram, quantized: Mapping[str, OpPlan]) -> dict[str, StoredWeight]:
    """Node name -> its compressed weight, for each entry of `quantized` that compresses one; those that share a
    placeholder share it here. KeyError for a node that is not in the graph, ValueError for a weight that is not as
    `LowerRequest.quantized` says."""
    nodes = {node.name: node for node in program.graph.nodes}
    values = weights(program)
    made: dict[tuple[str, OpPlan], StoredWeight] = {}
    found = {}
    for name, op in quantized.items():
        if op.precision not in COMPRESSED or op.op == "matmul":
            continue
        node = nodes[name]
        if node.target not in WEIGHTED:
            raise ValueError(f"`{name}` is planned as a {op.op}, and is a call of {node.target}")
        source = node.args[1]
        assert isinstance(source, Node)
        key = (source.name, op.model_copy(update={"input": None, "output": None, "step_inputs": ()}))
        if key not in made:
            made[key] = _stored(source, values, op, channel_axis(node))
        found[name] = made[key]
    return found


def with_float_weights(program: ExportedProgram, stored: Mapping[str, StoredWeight]) -> ExportedProgram:
    """`program` with float weights where the nodes of `stored` read dequantized ones; what quantizes values stays.

    For converters that change weights on their way: what they did shows in the floats.
    """
    editor = Editor(program, "float-weights")
    made: dict[str, Node] = {}
    for node in editor.nodes(*WEIGHTED):
        source = node.args[1]
        if node.name not in stored or not isinstance(source, Node) or source.target is not DEQUANTIZE_CHANNELS:
            continue
        if source.name not in made:
            with editor.at(source):
                value = torch.from_numpy(stored[node.name].value())
                made[source.name] = editor.constant(value, editor.named(node, "float_weight"))
        node.update_arg(1, made[source.name])
        editor.changes += 1
    return editor.finish() if editor.changes else program


def _stored(source: Node, values: Mapping[str, Tensor], op: OpPlan, axis: int) -> StoredWeight:
    if source.target is DEQUANTIZE_CHANNELS:
        codes, scales, zero_points, along, *_ = source.args
        held = [values[str(one)] for one in (codes, scales, zero_points)]
        if along != axis or held[0].dtype != torch.int8 or bool(held[2].any()):
            raise ValueError(f"`{source.name}` is not int8, symmetric and of one scale an output channel")
        shape = [-1 if at == axis else 1 for at in range(held[0].dim())]
        return StoredWeight(8, held[0].numpy(), scales=held[1].float().view(shape).numpy())
    if source.name not in values:
        raise ValueError(f"the weight `{source.name}` is computed")
    return _encoded(values[source.name].detach(), op, axis, source.name)


def _repeated(parameter: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """One element for each block, repeated to `shape`; axes of one block broadcast."""
    for axis, (blocks, size) in enumerate(zip(parameter.shape, shape, strict=True)):
        if blocks not in (1, size):
            parameter = parameter.repeat(size // blocks, axis)
    return np.broadcast_to(parameter, shape)


def _encoded(weight: Tensor, op: OpPlan, axis: int, name: str) -> StoredWeight:
    """Of a weight on its grid: encoding it again gives the codes that it was made of."""
    encoded = encode_weight(weight, op, axis, name=name)
    numbers = encoded.scales if encoded.tables is None else encoded.tables
    assert numbers is not None
    blocks = [1] * encoded.codes.dim()
    blocks[0] = len(numbers)
    if encoded.tables is not None:
        tables = numbers.view(*blocks, numbers.shape[1]).movedim(0, axis)
        return StoredWeight(encoded.bits, encoded.codes.numpy(), tables=tables.contiguous().numpy())
    if numbers.dim() == 2:
        blocks[1] = numbers.shape[1]
    scales = numbers.view(blocks).movedim(0, axis)
    return StoredWeight(encoded.bits, encoded.codes.numpy(), scales=scales.contiguous().numpy())
