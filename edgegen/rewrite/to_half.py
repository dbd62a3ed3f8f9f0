"""The float16 form of a float32 graph, behind a float32 boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline
from edgegen.rewrite.remove_identities import ASSERTS

aten = torch.ops.aten
HALF_MAX = 65504.0
_CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True)
class ToHalf(Pass):
    """Every float32 value becomes float16; inputs and outputs of the graph stay float32, islands are computed in it.

        %w: f32[8, 4] = weight                               %w: f16[8, 4] = weight
        %x: f32[1, 4] = placeholder[x]                       %x: f32[1, 4] = placeholder[x]
                                                             %h: f16[1, 4] = aten.to.dtype(%x, float16)
        %a: f32[1, 8] = aten.linear(%x, %w)           ->     %a: f16[1, 8] = aten.linear(%h, %w)
        %b: f32[1, 8] = aten.exp(%a)  # an island            %c: f32[1, 8] = aten.to.dtype(%a, float32)
                                                             %b: f32[1, 8] = aten.exp(%c)
        return %b                                            return %b

    An edge between a float16 call and an island has one cast, shared by all readers; between islands there is none. A
    weight that both read is held twice. Arguments that say float32 (`to`, `full`, `arange`, `sum(dtype=)`) say float16.
    A literal beyond float16 becomes infinite, as it does in every runtime. Asserts on dtypes are dropped.

    Left in float32
    1. the calls named in `islands` and the parts (`getitem`) of their values;
    2. a value that only integers and truth values are made from: rounding could move an index;
    3. a cast from float16 to float32 that is there already, and float64;
    A weight or literal that does not fit float16 is converted and recorded as declined: `half_safety` decides.
    EdgegenError for an island that is not in the graph.
    """

    islands: tuple[str, ...] = ()
    """Names of calls, as the graph that this pass is given has them."""

    name: ClassVar[str] = "to-half"
    tolerance: ClassVar[float] = 2e-2
    after: ClassVar[tuple[str, ...]] = (
        "specialise-timestep",
        "finite-masks",
        "two-pass-variance",
        "prescale-sums",
        "raise-epsilon",
    )

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        calls = {node.name: node for node in editor.nodes()}
        missing = [name for name in self.islands if name not in calls]
        if missing:
            raise EdgegenError(f"pass `{self.name}`: there is no call `{missing[0]}` to keep in float32")
        for node in editor.nodes(*ASSERTS):
            editor.graph.erase_node(node)
        conversion = _Conversion(editor, set(self.islands))
        if not conversion.half:
            return Rewritten(program, False)
        conversion.run()
        return Rewritten(editor.finish(), True, tuple(conversion.declined))


class _Conversion:
    """Which calls become float16, and the edits that make them so, in the order of the graph."""

    def __init__(self, editor: Editor, islands: set[str]) -> None:
        self._editor = editor
        self._cast: dict[tuple[Node, torch.dtype], Node] = {}
        self._halved: dict[int, Tensor] = {}
        self.declined: list[Decline] = []
        kept: set[Node] = set()
        for node in editor.nodes():
            source = node.args[0] if node.args else None
            of_kept = _is_part(node) and source in kept
            if node.name in islands or of_kept or _widens(node):
                kept.add(node)
        whole: set[Node] = set()  # only integers are made from it
        for node in reversed(editor.nodes()):
            if _is_single(node) and node.users and all(_gives_no_float(one) or one in whole for one in node.users):
                whole.add(node)
        kept |= whole
        self.half = {node for node in editor.nodes() if _is_single(node) and node not in kept}
        self._kept = {node for node in kept if _is_single(node)}

    def run(self) -> None:
        output = self._editor.graph.output_node()
        wanted = [value.meta["val"].dtype for value in output.all_input_nodes]
        weights = self._weights()
        for node in self._editor.nodes():
            if node in self.half:
                self._to_half(node, weights)
            else:
                if node in self._kept:
                    self._feed(node, torch.float16, torch.float32, {})
                self._editor.propagate(node)
        for value, dtype in zip(output.all_input_nodes, wanted, strict=True):
            if dtype is torch.float32 and value.meta["val"].dtype is torch.float16:
                output.replace_input_with(value, self._as(value, torch.float32, output))

    def _to_half(self, node: Node, weights: dict[Node, Node]) -> None:
        self._feed(node, torch.float32, torch.float16, weights)
        node.args = tuple(self._literal(node, value) for value in node.args)
        kwargs = {name: self._literal(node, value) for name, value in node.kwargs.items()}
        makes = not node.all_input_nodes and isinstance(node.target, torch._ops.OpOverload)
        if makes and any(one.name == "dtype" for one in node.target._schema.arguments):  # type: ignore[union-attr]
            kwargs["dtype"] = torch.float16
        node.kwargs = kwargs
        self._editor.propagate(node)
        if isinstance(node.meta["val"], Tensor) and node.meta["val"].dtype is torch.float32:
            readers = list(node.users)
            with self._editor.at(node.next):
                cast = self._editor.call(aten.to.dtype, node, torch.float16)
            for reader in readers:
                reader.replace_input_with(node, cast)

    def _feed(self, node: Node, old: torch.dtype, new: torch.dtype, weights: dict[Node, Node]) -> None:
        """Arguments of `node` that are `old` arrive as `new`."""

        def given(arg: Node) -> Node:
            value = arg.meta["val"]
            if not isinstance(value, Tensor) or value.dtype is not old:
                return arg
            return weights[arg] if arg in weights else self._as(arg, new, node)

        if _is_part(node):
            return
        node.args = map_arg(node.args, given)
        node.kwargs = map_arg(node.kwargs, given)

    def _as(self, value: Node, dtype: torch.dtype, reader: Node) -> Node:
        if (value, dtype) not in self._cast:
            with self._editor.at(reader):
                self._cast[value, dtype] = self._editor.call(aten.to.dtype, value, dtype)
        return self._cast[value, dtype]

    def _literal(self, node: Node, value: Any) -> Any:
        if value is torch.float32:
            return torch.float16
        if isinstance(value, float) and HALF_MAX < abs(value) < math.inf:
            self.declined.append(decline(node, f"the literal {value:g} becomes infinite in float16"))
            return math.copysign(math.inf, value)
        return value

    def _weights(self) -> dict[Node, Node]:
        """Weights that float16 calls read -> the float16 weight to read: the same placeholder where no other reads."""
        found = {}
        for node in [one for one in self._editor.graph.nodes if one.op == "placeholder"]:
            value = self._editor.value(node)
            if value is None or value.dtype is not torch.float32 or not any(user in self.half for user in node.users):
                continue
            half = self._halved.setdefault(id(value), value.detach().half())
            if not torch.isfinite(half).all():
                self.declined.append(decline(node, "a weight does not fit float16 and becomes infinite"))
            if all(user in self.half for user in node.users):
                self._editor.set_weight(node, half)
            else:
                reader = next(user for user in node.users if user in self.half)
                with self._editor.at(reader):
                    found[node] = self._editor.constant(half, f"{node.target}_half")
        return found


def _is_part(node: Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload)


def _values(node: Node) -> list[Tensor]:
    made = node.meta.get("val")
    return [one for one in (made if isinstance(made, tuple | list) else [made]) if isinstance(one, Tensor)]


def _is_single(node: Node) -> bool:
    return any(value.dtype is torch.float32 for value in _values(node))


def _gives_no_float(node: Node) -> bool:
    values = _values(node)
    return node.op == "call_function" and bool(values) and not any(value.is_floating_point() for value in values)


def _widens(node: Node) -> bool:
    source = node.args[0] if node.args else None
    return node.target in _CASTS and isinstance(source, Node) and source.meta["val"].dtype is torch.float16
