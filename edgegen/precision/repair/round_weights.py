"""Weights rounded so that what they compute stays, not each by itself: GPTQ (arXiv 2210.17323) on calibration inputs.

A weight is rounded input by input; the error of each is taken up by those that are not rounded yet, as far as the
inputs go together (H = X X^T, the inputs as the quantized graph has them). Convolutions are matrix products of patches.
H is kept for blocks of inputs of bounded size, so a layer of thousands of inputs costs a bounded amount of memory.

Scales are those of `edgegen.precision.encode`, and stay: in each group that shares one the greatest code is kept, so
the result is on the grid that encoding it finds again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor, module_path
from edgegen.graph.evaluate import evaluate
from edgegen.precision.encode import WEIGHT_MAX, encode_weight
from edgegen.precision.plan import BITS, COMPRESSED, OpPlan
from edgegen.precision.quantize import quantized
from edgegen.precision.repair.tensors import Repaired, RepairRecord, Samples, Tensors, apply, quantized_db
from edgegen.precision.sites import LINEAR

aten = torch.ops.aten
CONV2D = aten.conv2d.default
BLOCK = 1152
"""Inputs whose products are known together: 128 channels of a 3x3 convolution, 5 MB."""
POSITIONS = 1024
"""Places of a convolution's output, or rows of a linear's input, that count in each sample."""
DAMPING = 0.01
"""Of the mean of H's diagonal, added to it."""
LAZY = 64
"""Inputs after which the rest of the block is updated."""


@dataclass
class _Layer:
    """One op to round: its call, its weight as a matrix [N, inputs], and H in blocks along its diagonal."""

    node: Node
    op: OpPlan
    weight: Tensor
    blocks: list[Tensor]

    @property
    def starts(self) -> list[int]:
        return [sum(len(one) for one in self.blocks[:place]) for place in range(len(self.blocks))]


def round_weights(program: ExportedProgram, ops: Mapping[str, OpPlan], samples: Samples) -> Repaired:
    """`program` with the weights of its compressed affine `ops` (by calls) on their grid, rounded for `samples`.

    A layer keeps the nearest codes where the new ones are no better on its own inputs. All layers keep them, and the
    record says so, where the whole graph is not better with the new ones.
    """
    layers, declined = _layers(program, ops)
    _observe(program, ops, layers, samples)
    tensors: Tensors = {}
    changed = []
    for layer in layers:
        rounded = _rounded(layer)
        if rounded is None:
            declined[module_path(layer.node)] = "the nearest codes are the best"
            continue
        tensors[f"{layer.node.name}:1"] = rounded
        changed.append(module_path(layer.node))
        layer.blocks.clear()
    before = quantized_db(program, program, ops, samples)
    repaired = apply(program, tensors)
    after = quantized_db(program, repaired, ops, samples)
    if after <= before:
        record = RepairRecord(name="round-weights", changed=(), before_db=before, after_db=before, declined=declined)
        return Repaired(program, {}, record)
    record = RepairRecord(
        name="round-weights", changed=tuple(changed), before_db=before, after_db=after, declined=declined
    )
    return Repaired(repaired, tensors, record)


def _layers(program: ExportedProgram, ops: Mapping[str, OpPlan]) -> tuple[list[_Layer], dict[str, str]]:
    editor = Editor(program, "round-weights")  # for its values alone
    found, declined = [], {}
    for node in editor.nodes():
        op = ops.get(node.name)
        if op is None or op.op == "matmul" or op.precision not in COMPRESSED:
            continue
        weight: Any = node.args[1]
        value = editor.value(weight)
        reason = None
        if value is None or len(weight.users) != 1:
            reason = "another call reads its weight"
        elif op.form == "palette":
            reason = "a palette has no scale to round by"
        elif node.target not in (LINEAR, CONV2D):
            reason = "only linears and 2-d convolutions are rounded"
        elif not isinstance(_argument(node, 4, [0, 0]), list | tuple):
            reason = "its padding is said in words"
        if reason is not None:
            declined[module_path(node)] = reason
            continue
        assert value is not None
        matrix = value.detach().float().flatten(1)
        sizes = [BLOCK] * (matrix.shape[1] // BLOCK) + ([matrix.shape[1] % BLOCK] if matrix.shape[1] % BLOCK else [])
        found.append(_Layer(node, op, matrix.view(value.shape), [torch.zeros(size, size) for size in sizes]))
    return found, declined


def _observe(program: ExportedProgram, ops: Mapping[str, OpPlan], layers: list[_Layer], samples: Samples) -> None:
    """Fill every H from the inputs that the quantized graph gives its ops."""
    graph = quantized(program, ops)
    calls = {node.name: node for node in graph.graph.nodes}
    by_input: dict[str, list[_Layer]] = {}
    for layer in layers:
        source: Any = calls[layer.node.name].args[0]
        by_input.setdefault(source.name, []).append(layer)

    def add(name: str, value: Tensor) -> None:
        for layer in by_input.get(name, ()):
            rows = _rows(layer, value)
            for start, block in zip(layer.starts, layer.blocks, strict=True):
                part = rows[:, start : start + len(block)]
                block.addmm_(part.T, part)

    for sample in samples:
        for name, value in sample.items():
            add(name, value)
        evaluate(graph, sample, lambda node, value: add(node.name, value))


def _rows(layer: _Layer, value: Tensor) -> Tensor:
    """What the op multiplies with its weight: [positions, inputs], an even share of all positions."""
    node = layer.node
    if node.target is LINEAR:
        rows = value.reshape(-1, value.shape[-1])
        return rows[:: -(-len(rows) // POSITIONS)].float()
    kernel = layer.weight.shape[2:]
    stride, padding = _argument(node, 3, [1, 1]), _argument(node, 4, [0, 0])
    dilation = _argument(node, 5, [1, 1])
    groups = _argument(node, 6, 1)
    if groups != 1:  # every group sees inputs of its own: their sum is what is known of each
        value = value.reshape(-1, value.shape[1] // groups, *value.shape[2:])
    patches = torch.nn.functional.unfold(value.float(), kernel, dilation, padding, stride)
    step = -(-patches.shape[0] * patches.shape[2] // POSITIONS)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])[::step]


def _argument(node: Node, place: int, usual: Any) -> Any:
    return node.args[place] if len(node.args) > place else usual


def _rounded(layer: _Layer) -> Tensor | None:
    """The weight on its grid; None where rounding to the nearest is as good."""
    encoded = encode_weight(layer.weight, layer.op, 0)
    assert encoded.scales is not None
    matrix, nearest = layer.weight.flatten(1), encoded.decode().flatten(1)
    top = WEIGHT_MAX[BITS[layer.op.precision]]
    scales = encoded.scales.reshape(len(matrix), -1).repeat_interleave(
        matrix.shape[1] // encoded.scales.reshape(len(matrix), -1).shape[1], 1
    )
    kept = _greatest(encoded.codes.flatten(1), encoded.scales.reshape(len(matrix), -1).shape[1], top)
    parts = []
    for start, products in zip(layer.starts, layer.blocks, strict=True):
        columns = slice(start, start + len(products))
        made = _block(matrix[:, columns], products, scales[:, columns], kept[:, columns], nearest[:, columns], top)
        old, new = (_error(matrix[:, columns] - one, products) for one in (nearest[:, columns], made))
        # Row by row: what is better for one output channel need not be for the next.
        parts.append(torch.where((new < old)[:, None], made, nearest[:, columns]))
    rounded = torch.cat(parts, 1)
    return None if torch.equal(rounded, nearest) else rounded.view(layer.weight.shape)


def _greatest(codes: Tensor, groups: int, top: int) -> Tensor:
    """[N, inputs]: the one code of each group that holds its scale in place."""
    grouped = codes.reshape(len(codes), groups, -1).abs()
    place = grouped.argmax(-1, keepdim=True)
    marked = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, place, True)
    return (marked & (grouped == top)).view(codes.shape)


def _error(difference: Tensor, products: Tensor) -> Tensor:
    """Of each row, on the inputs."""
    return ((difference @ products) * difference).sum(1)


def _block(weight: Tensor, products: Tensor, scales: Tensor, kept: Tensor, nearest: Tensor, top: int) -> Tensor:
    """GPTQ on one block: column by column, the error of each into those behind it."""
    size = len(products)
    diagonal = products.diagonal()
    damped = products + torch.eye(size) * (DAMPING * float(diagonal.mean()) + 1e-8)
    # Inputs that count most are rounded first, while there are many left to take their error.
    order = diagonal.argsort(descending=True, stable=True)
    damped = damped[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    work, step = weight[:, order].clone(), scales[:, order]
    fixed, codes = kept[:, order], nearest[:, order]
    made = torch.empty_like(work)
    for start in range(0, size, LAZY):
        end = min(start + LAZY, size)
        errors = torch.empty(len(work), end - start)
        for place in range(start, end):
            column, width = work[:, place], step[:, place]
            rounded = (column / width).round().clamp(-top, top) * width
            rounded = torch.where(fixed[:, place], codes[:, place], rounded)
            made[:, place] = rounded
            error = (column - rounded) / upper[place, place]
            work[:, place:end] -= error[:, None] * upper[place, place:end]
            errors[:, place - start] = error
        work[:, end:] -= errors @ upper[start:end, end:]
    back = torch.empty_like(order)
    back[order] = torch.arange(size)
    return made[:, back]
