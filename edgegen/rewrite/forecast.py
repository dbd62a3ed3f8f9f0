"""How many pieces a runtime will cut a graph into, and which ops cut it, before anything is lowered.

What a delegate takes is data (`targets/delegates/*.toml`, `takes`). The graph is decomposed as the converter will
decompose it, each op is looked up, and the ops that are taken are grouped by the runtime's own rule:

- ExecuTorch merges any two groups unless a path leaves the merged group and comes back (its `GroupBasedPartitioner`);
- TFLite takes what is ready in turns, inside the delegate and outside (`PartitionGraphIntoIndependentNodeSubsets`);
- onnxruntime's CPU provider runs every op; Core ML and Core AI decide on the device: only ops that are known to leave
  the Neural Engine are told, no number of pieces.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from edgegen.graph.decompose import decomposed
from edgegen.graph.edit import module_path, user_inputs, weights
from edgegen.lower.backend import Delegation
from edgegen.targets.model import Condition, Delegate, Taken, TakenOp
from edgegen.targets.read import load_delegate

aten = torch.ops.aten
HOST_DELEGATES = {
    "executorch": "executorch-xnnpack",
    "tflite": "litert-xnnpack",
    "onnx": "onnxruntime-cpu",
    "coreml": "neural-engine",
    "coreai": "core-ai",
}
"""The delegate that a forecast is for, unless another is asked about: where it can be, the one that lowering counts."""
UNCOUNTED = ("coreml", "coreai")


class Outside(BaseModel):
    """A call that stays outside: `node` and `module` of the captured graph, `op` as it stands after decomposition.

    `cuts`: something inside comes before it and something after it, so that it parts one piece from another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: str
    op: str
    module: str
    reason: str
    cuts: bool


class Forecast(BaseModel):
    """`pieces` None: the runtime decides on the device, and only what leaves the accelerator is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    delegate: str
    pieces: int | None
    delegated_ops: int
    outside: tuple[Outside, ...]
    note: str = ""

    @property
    def full(self) -> bool:
        """One piece and nothing outside: what a gate on full delegation asks."""
        return self.pieces == 1 and not self.outside

    def off_by(self, fact: Delegation) -> int | None:
        """Pieces foreseen minus pieces counted; None when either is not known."""
        if self.pieces is None or fact.pieces is None:
            return None
        return self.pieces - fact.pieces


def forecast(program: ExportedProgram, backend: str, delegate: Delegate | None = None) -> Forecast:
    """What `backend` will do with `program`, which stays as it is; `delegate` defaults to `HOST_DELEGATES[backend]`.

    KeyError for an unknown backend.
    """
    chosen = load_delegate(HOST_DELEGATES[backend]) if delegate is None else delegate
    taken = chosen.takes
    if taken is None:
        return Forecast(
            backend=backend,
            delegate=chosen.name,
            pieces=None,
            delegated_ops=0,
            outside=(),
            note="nothing is known of what this delegate takes",
        )
    converted, origin = _as_converted(program, taken)
    graph = _Graph(program, converted, taken, chosen)
    pieces = _PARTITION.get(backend, _one_piece)(graph)
    masks = [sum(1 << place for place in piece) for piece in pieces]
    everything = sum(masks)
    outside = []
    for place in graph.computed:
        node = graph.nodes[place]
        if taken.casts_whole_numbers:
            outside += [_cast(origin.get(node, node))] * _whole_numbers(node)
        if everything >> place & 1:
            continue
        cuts = bool(graph.before[place] & everything) and bool(graph.after[place] & everything)
        source = origin.get(node, node)
        reason = graph.refused[place]
        outside.append(
            Outside(node=source.name, op=str(node.target), module=module_path(source), reason=reason, cuts=cuts)
        )
    note = "where ops run is decided on the device" if backend in UNCOUNTED else ""
    return Forecast(
        backend=backend,
        delegate=chosen.name,
        pieces=None if backend in UNCOUNTED else len(pieces),
        delegated_ops=sum(everything >> place & 1 for place in graph.computed),
        outside=tuple(outside),
        note=note,
    )


def _as_converted(program: ExportedProgram, taken: Taken) -> tuple[Graph, dict[Node, Node]]:
    """The graph as a converter sees it: torch's core decompositions, except of what the delegate takes whole."""
    if any(one.op == "*" for one in taken.ops):
        return program.graph, {}
    names = [one.op.removeprefix("aten.").split(".") for one in taken.ops]
    return decomposed(program, {getattr(getattr(aten, name), overload) for name, overload in names})


class _Graph:
    """A decomposed graph by place: what reaches what as bit masks, what is taken, why the rest is not."""

    def __init__(self, program: ExportedProgram, graph: Graph, taken: Taken, delegate: Delegate) -> None:
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        place_of = {node: place for place, node in enumerate(self.nodes)}
        self.inputs = [[place_of[one] for one in node.all_input_nodes] for node in self.nodes]
        self.before, self.after = [0] * len(self.nodes), [0] * len(self.nodes)
        for place, sources in enumerate(self.inputs):
            for source in sources:
                self.before[place] |= self.before[source] | 1 << source
        for place in reversed(range(len(self.nodes))):
            for source in self.inputs[place]:
                self.after[source] |= self.after[place] | 1 << place
        held = weights(program)
        names = {node.name for node in user_inputs(program)}
        given = {node.name: 1 << place for place, node in enumerate(self.nodes) if node.name in names}
        time = given.get("timestep", 0)
        read = sum(given.values())
        folded = {
            node
            for place, node in enumerate(self.nodes)
            if taken.folds_constants and not (self.before[place] | 1 << place) & read
        }
        timed = {node for place, node in enumerate(self.nodes) if self.before[place] & time}
        context = _Context(held, folded, timed)
        self.groups: dict[int, list[int]] = {}
        """Last place of an op that is taken -> the places that go with it."""
        self.refused: dict[int, str] = {}
        self.computed = [
            place
            for place, node in enumerate(self.nodes)
            if node.op == "call_function" and not _vanishes(node) and node not in folded
        ]
        denied = {one.op: one.reason for one in delegate.denied_ops if one.when is None}
        rules = {one.op: one for one in taken.ops}
        for place in self.computed:
            node = self.nodes[place]
            reason = _refusal(node, rules, taken, denied, context)
            if reason is not None:
                self.refused[place] = reason
                continue
            group = [place]
            group += [place_of[user] for user in node.users if user.target is operator.getitem]
            if str(node.target) in rules and "static weights" in rules[str(node.target)].only:
                group += [place_of[one] for one in node.all_input_nodes if one.name in held]
            self.groups[place] = group


@dataclass(frozen=True)
class _Context:
    held: dict[str, Tensor]
    """Weights by placeholder."""
    folded: set[Node]
    """What the converter computes itself, weights included."""
    timed: set[Node]
    """What depends on the timestep."""

    def holds(self, value: Any) -> bool:
        """Whether an argument is known when the graph is converted."""
        return not isinstance(value, Node) or value.name in self.held or value in self.folded


def _vanishes(node: Node) -> bool:
    """Calls that converters drop, or that compute nothing."""
    if node.target is operator.getitem or "_assert" in str(node.target):
        return True
    source = node.args[0] if node.args else None
    if node.target not in (aten._to_copy.default, aten.slice.Tensor) or not isinstance(source, Node):
        return False
    a, b = source.meta["val"], node.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype)


def _refusal(
    node: Node, rules: dict[str, TakenOp], taken: Taken, denied: dict[str, str], context: _Context
) -> str | None:
    """Why the delegate leaves `node` out, or None."""
    name = str(node.target)
    rule = rules.get(name, rules.get("*"))
    if rule is None:
        bare = name.rpartition(".")[0]
        return denied.get(name) or denied.get(bare) or "not among the ops that the delegate takes"
    if taken.dtypes:
        strange = [dtype for dtype in _dtypes(node, context.folded) if dtype not in taken.dtypes]
        if strange:
            return f"a tensor of {strange[0]}: the delegate takes {' and '.join(taken.dtypes)}"
    every = rules["*"].only if "*" in rules else ()
    for condition in (*rule.only, *every):
        if not CONDITIONS[condition](node, context):
            return f"taken only with: {condition}"
    return None


def _whole_numbers(node: Node) -> int:
    """Integers that a call gives where its schema has tensors, beside floating tensors."""
    if not any(dtype.startswith("float") for dtype in _dtypes(node)) or not isinstance(
        node.target, torch._ops.OpOverload
    ):
        return 0
    slots = zip(node.args, node.target._schema.arguments, strict=False)
    return sum(type(value) is int and isinstance(slot.type, torch.TensorType) for value, slot in slots)


def _cast(node: Node) -> Outside:
    return Outside(
        node=node.name,
        op=str(aten._to_copy.default),
        module=module_path(node),
        reason="a whole number among floats is cast outside: written with a point it is a constant",
        cuts=False,
    )


def _dtypes(node: Node, folded: Collection[Node] = ()) -> list[str]:
    """Of what a call reads and gives, save what is `folded`; indices beside a result (`max.dim`) are left out."""
    values = [one.meta.get("val") for one in node.all_input_nodes if one not in folded]
    made = node.meta["val"]
    values.append(made[0] if isinstance(made, tuple | list) else made)
    return [str(value.dtype).removeprefix("torch.") for value in values if isinstance(value, Tensor)]


def _argument(node: Node, place: int, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else default


def _source(node: Node) -> Tensor:
    first = node.args[0]
    assert isinstance(first, Node)
    value = first.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _ranks(node: Node) -> Iterator[int]:
    for one in (*node.all_input_nodes, node):
        value = one.meta.get("val")
        for part in value if isinstance(value, tuple | list) else [value]:
            if isinstance(part, Tensor):
                yield part.dim()


_WEIGHTS: dict[Any, tuple[int, ...]] = {
    aten.addmm.default: (0, 2),
    aten._native_batch_norm_legit_no_training.default: (1, 2, 3, 4),
}


def _static(node: Node, context: _Context) -> bool:
    """Weight and bias are held, and a batch norm's statistics."""
    places = _WEIGHTS.get(node.target, (1, 2))
    found = [node.args[place] for place in places if place < len(node.args)]
    return all(context.holds(one) for one in found)


def _within(node: Node, _: _Context) -> bool:
    kernel = _argument(node, 1, [1])
    stride = _argument(node, 2, []) or kernel
    return all(step <= size for step, size in zip(stride, kernel, strict=True))


def _no_truths(node: Node, context: _Context) -> bool:
    """Attention without a mask, or with one that is added or a constant."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    truths = isinstance(mask, Node) and mask.meta["val"].dtype == torch.bool and not context.holds(mask)
    return not causal and not truths


def _scaled(node: Node, context: _Context) -> bool:
    """A converter drops a multiplication by one, and leaves the broadcast to the group's channels that it hid."""
    scale, channels, groups = node.args[1], node.args[4], node.args[6]
    value = context.held.get(scale.name) if isinstance(scale, Node) else None
    return value is None or channels == groups or not bool((value == 1).all())


def _whole(node: Node, axes: Any) -> list[int]:
    rank = _source(node).dim()
    return sorted(axis % rank for axis in (axes if isinstance(axes, list | tuple) else [axes]))


CONDITIONS: dict[Condition, Callable[[Node, _Context], bool]] = {
    "alpha is 1": lambda node, _: bool(node.kwargs.get("alpha", 1) == 1),
    "batch of 2 or more": lambda node, _: math.prod(_source(node).shape[:-2]) >= 2,
    "finite fill": lambda node, _: not isinstance(fill := _argument(node, 2, 0), float) or abs(fill) != float("inf"),
    "first result only": lambda node, _: all(user.args[1] == 0 for user in node.users),
    "keeps the axes": lambda node, _: bool(_argument(node, 2, False)),
    "last axis": lambda node, _: _argument(node, 1, -1) in (-1, _source(node).dim() - 1),
    "no ceil mode": lambda node, _: not _argument(node, 4 if "avg" in str(node.target) else 5, False),
    "no cropping": lambda node, _: all(size >= 0 for size in _argument(node, 1, [])),
    "no mask of truths": _no_truths,
    "no padding counted": lambda node, _: not _argument(node, 5, True),
    "not fp16": lambda node, _: node.meta["val"].dtype != torch.float16,
    "not on the timestep": lambda node, context: node not in context.timed,
    "one dtype": lambda node, _: len(set(_dtypes(node))) == 1,
    "one or two spatial axes": lambda node, _: len(_argument(node, 3, [])) <= 2,
    "power of 0.5 or 2": lambda node, _: _argument(node, 1, None) in (0.5, 2),
    "power of 2": lambda node, _: _argument(node, 1, None) == 2 and isinstance(node.args[1], int),
    "rank 4": lambda node, _: _source(node).dim() == 4,
    "rank at most 4": lambda node, _: max(_ranks(node)) <= 4,
    "rank at most 5": lambda node, _: max(_ranks(node)) <= 5,
    "same dtype": lambda node, _: _source(node).dtype == node.meta["val"].dtype,
    "scale is not all ones": _scaled,
    "spatial axes": lambda node, _: _source(node).dim() == 4 and _whole(node, _argument(node, 1, [])) == [2, 3],
    "static weights": _static,
    "step of 1": lambda node, _: _argument(node, 4, 1) == 1,
    "stride within the kernel": _within,
    "trailing axis": lambda node, _: _argument(node, 1, None) in (-1, _source(node).dim()),
    "two or more tensors": lambda node, _: len(node.all_input_nodes) >= 2,
    "zero fill": lambda node, _: _argument(node, 2, 0) == 0,
}


def _merged(graph: _Graph) -> list[set[int]]:
    """Groups merged pairwise from the last to the first, as long as no path leaves the merged one and comes back."""
    joined = _disjoint(graph)
    starts = sorted(
        joined, key=lambda group: max(p for p in group if graph.nodes[p].op == "call_function"), reverse=True
    )
    masks = [sum(1 << place for place in group) for group in starts]
    before = [_union(graph.before, group) for group in starts]
    after = [_union(graph.after, group) for group in starts]
    gone: set[int] = set()
    for first in range(len(starts)):
        if first in gone:
            continue
        for second in range(first + 1, len(starts)):
            if second in gone:
                continue
            mask = masks[first] | masks[second]
            reached, reaching = after[first] | after[second], before[first] | before[second]
            if reached & reaching & ~mask:
                continue
            masks[first], after[first], before[first] = mask, reached, reaching
            gone.add(second)
    return [{p for p in range(len(graph.nodes)) if masks[i] >> p & 1} for i in range(len(starts)) if i not in gone]


def _disjoint(graph: _Graph) -> list[set[int]]:
    """Groups that share a member are one; a weight belongs to the first that reads it, since weights are copied."""
    seen: set[int] = set()
    groups: list[set[int]] = []
    for group in graph.groups.values():
        kept = {p for p in group if graph.nodes[p].op == "call_function" or p not in seen}
        seen |= kept
        groups.append(kept)
    return groups


def _union(masks: Sequence[int], places: set[int]) -> int:
    found = 0
    for place in places:
        found |= masks[place]
    return found


def _turns(graph: _Graph) -> list[set[int]]:
    """Alternately everything that is ready and taken, and everything that is ready and not."""
    left = list(graph.computed)
    vanished = {p for p, node in enumerate(graph.nodes) if node.op != "call_function"}
    done = set(vanished)
    pieces: list[set[int]] = []
    inside = bool(left) and left[0] in graph.groups
    while left:
        turn: set[int] = set()
        for place in range(len(graph.nodes)):
            if place in done or any(source not in done for source in graph.inputs[place]):
                continue
            passes = place not in graph.groups and place not in graph.refused
            if passes or (place in graph.groups) == inside:
                done.add(place)
                if not passes:
                    turn.add(place)
        if inside and turn:
            pieces.append(turn)
        left = [place for place in left if place not in done]
        inside = not inside
    return pieces


def _one_piece(graph: _Graph) -> list[set[int]]:
    return [set(graph.groups)]


_PARTITION: dict[str, Callable[[_Graph], list[set[int]]]] = {"executorch": _merged, "tflite": _turns}
