"""A TFLite file and the graph that it was converted from: which operator of the one is which call of the other.

A planned call is found in the file by its weight, byte for byte, and by its name: before conversion each planned call
gets its own level in the module stack, from which the converter names tensors.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgegen.errors import EdgegenError
from edgegen.precision.plan import OpPlan

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Node

PREFIX = "planned."
WEIGHT_INPUT = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1}


@dataclass(frozen=True)
class Place:
    """Where a planned call is in the file: an operator of the first subgraph, its kind, its output's name.

    `factor`: its weight is so many times the call's, and what it reads is so many times less.
    """

    index: int
    kind: str
    output: str
    factor: float = 1.0


def marked(program: ExportedProgram, ops: Mapping[str, OpPlan]) -> ExportedProgram:
    """`program` whose planned calls can be told by the names of their tensors in the file."""
    from edgegen.graph.edit import private_program

    own = private_program(program)
    for node in own.graph.nodes:
        if node.name in ops:
            stack = dict(node.meta.get("nn_module_stack") or {})
            stack[PREFIX] = ("", f"{PREFIX}{node.name}")
            node.meta["nn_module_stack"] = stack
    return own


class FileGraph:
    """The first subgraph of a model, with names for what the flatbuffer numbers."""

    def __init__(self, model: Any) -> None:
        from ai_edge_quantizer import qtyping

        kinds = {code: name for name, code in vars(qtyping.BuiltinOperator).items() if not name.startswith("_")}
        types = {code: name for name, code in vars(qtyping.TensorType).items() if not name.startswith("_")}
        self._model = model
        self._graph = model.subgraphs[0]
        self._kinds = [kinds[code.builtinCode] for code in model.operatorCodes]
        self._types = types
        self.producer = {int(out): op for op in self._graph.operators for out in op.outputs}

    def operators(self) -> Iterator[tuple[int, str, Any]]:
        for index, op in enumerate(self._graph.operators):
            yield index, self._kinds[op.opcodeIndex], op

    def kind(self, op: Any) -> str:
        return str(self._kinds[op.opcodeIndex])

    def name(self, tensor: int) -> str:
        return str(self._graph.tensors[tensor].name.decode())

    def type(self, tensor: int) -> str:
        return str(self._types[self._graph.tensors[tensor].type])

    def quantization(self, tensor: int) -> Any:
        return self._graph.tensors[tensor].quantization

    def shape(self, tensor: int) -> tuple[int, ...]:
        return tuple(int(size) for size in self._graph.tensors[tensor].shape)

    def constant(self, tensor: int) -> NDArray[np.generic] | None:
        """Bytes of a constant, None for a value."""
        data = self._model.buffers[self._graph.tensors[tensor].buffer].data
        return None if data is None or len(data) == 0 else np.frombuffer(data, np.uint8)


def places_of(graph: FileGraph, program: ExportedProgram, ops: Mapping[str, OpPlan]) -> dict[str, Place]:
    """Node name -> operator; every planned call has exactly one, and no two the same."""
    from edgegen.graph.edit import weights

    by_weight: defaultdict[bytes, list[Place]] = defaultdict(list)
    weight_in_file: dict[Place, NDArray[np.generic]] = {}
    products: list[Place] = []
    for index, kind, op in graph.operators():
        place = Place(index, kind, graph.name(int(op.outputs[0])))
        if kind == "BATCH_MATMUL" or (kind == "FULLY_CONNECTED" and graph.constant(int(op.inputs[1])) is None):
            products.append(place)
        elif kind in WEIGHT_INPUT:
            data = graph.constant(int(op.inputs[WEIGHT_INPUT[kind]]))
            if data is not None:
                by_weight[hashlib.sha256(data.tobytes()).digest()].append(place)
                weight_in_file[place] = data
    held, nodes = weights(program), {node.name: node for node in program.graph.nodes}
    found: dict[str, Place] = {}
    for name, op in ops.items():
        if name not in nodes:
            raise EdgegenError(f"the plan has `{name}`, which is no call of the graph")
        node = nodes[name]
        candidates = products
        if op.op != "matmul":
            weight = in_file_order(node, weight_of(node, held))
            candidates = by_weight[hashlib.sha256(weight.tobytes()).digest()]
            candidates = candidates or _scaled(node, weight, _named(list(weight_in_file), name), weight_in_file)
        if op.op == "matmul" or len(candidates) > 1:
            candidates = _named(candidates, name)
        if len(candidates) != 1:
            what = "no operator" if not candidates else f"{len(candidates)} operators"
            raise EdgegenError(
                f"`{name}` is planned as {op.precision} and {what} of the TFLite file can be told to be it",
                hint="give this op `fp32` in the plan; litert-torch has merged or rewritten it",
            )
        found[name] = candidates[0]
    twice = [name for name, count in Counter(place.index for place in found.values()).items() if count > 1]
    if twice:
        shared = ", ".join(f"`{name}`" for name, place in found.items() if place.index == twice[0])
        raise EdgegenError(f"{shared} became one operator of the TFLite file", hint="plan one of them as `fp32`")
    return found


def weight_of(node: Node, weights: Mapping[str, Tensor]) -> Tensor:
    weight: Any = node.args[1]
    if weight.name not in weights:
        raise EdgegenError(f"the weight of `{node.name}` is computed, so it cannot be compressed")
    return weights[weight.name]


def _named(places: list[Place], name: str) -> list[Place]:
    """Those whose output the converter named for the call `name`; it names what it fused for all of its calls."""
    fused: dict[Place, list[str]] = {}
    for place in places:
        parts = [part.partition(";")[0] for part in place.output.split(";;")]
        fused[place] = [part.rpartition("/")[2] for part in parts]
    own = f"{PREFIX}{name}"
    first = [place for place, calls in fused.items() if calls[0] == own]
    return first or [place for place, calls in fused.items() if own in calls]


def _scaled(
    node: Node, weight: NDArray[np.generic], places: list[Place], in_file: Mapping[Place, NDArray[np.generic]]
) -> list[Place]:
    """Those of `places` whose weight took in the number that the graph multiplies the call's input by."""
    import torch

    aten = torch.ops.aten
    source: Any = node.args[0]
    given: Any = source.args[1] if source.target in (aten.mul.Tensor, aten.div.Tensor) else None
    if not isinstance(given, int | float) or given <= 0:
        return []
    expected = given if source.target is aten.mul.Tensor else 1.0 / given
    found = []
    for place in places:
        other = in_file[place].view(np.float32)
        if other.size != weight.size:
            continue
        a, b = weight.reshape(-1).astype(np.float64), other.astype(np.float64)
        factor = float(a @ b) / max(float(a @ a), 1e-300)
        alike = np.allclose(b, factor * a, rtol=1e-5, atol=1e-6 * float(np.abs(b).max(initial=0.0)))
        if alike and abs(factor / expected - 1.0) < 1e-5:
            found.append(replace(place, factor=factor))
    return found


def in_file_order(node: Node, values: Tensor) -> NDArray[np.generic]:
    """A weight, or its codes, as TFLite has them: output channels first and input channels last."""
    from edgegen.precision.sites import channel_axis

    array: NDArray[np.generic] = values.detach().cpu().numpy()
    if array.ndim == 2:
        return np.ascontiguousarray(array)
    space = tuple(range(2, array.ndim))
    if channel_axis(node) == 1 or _is_depthwise(node, array.shape):
        return np.ascontiguousarray(array.transpose(1, *space, 0))
    return np.ascontiguousarray(array.transpose(0, *space, 1))


def _is_depthwise(node: Node, shape: tuple[int, ...]) -> bool:
    groups = node.args[6] if len(node.args) > 6 else 1
    return isinstance(groups, int) and groups > 1 and shape[1] == 1
