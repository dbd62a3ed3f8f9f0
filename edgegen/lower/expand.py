"""Decompose a program call by call: what needs no decomposition is kept as it is.

`ExportedProgram.run_decompositions` runs the whole graph on fake tensors several times over, functionalises it and
writes its source anew, also where hardly a call changes. Here each call runs once: one that has a decomposition, or is
a Python function that a converter put there, is replaced by the operators that it dispatches; any other is copied.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind, OutputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Decompositions = Mapping[Any, Callable[..., Any]]
_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node")
_RESHAPE = torch.ops.aten.reshape.default
_VIEW = torch.ops.aten.view.default


class NotExpandable(Exception):
    """The program has something that can only be decomposed as a whole; the message says what."""


def needs_expansion(program: ExportedProgram, table: Decompositions) -> bool:
    """Whether `expand` would replace any call."""
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return any(target is not operator.getitem and not _stays(target, table) for target in calls)


def expand(program: ExportedProgram, table: Decompositions) -> ExportedProgram:
    """`program` with each call of `table`, and each Python function, replaced by the operators it is made of.

    Composite operators that `table` lacks stay, but for views. Weights and inputs are as before, names of both too.
    Every node has `val` and `tensor_meta`, computed anew. `program` stays as it is. NotExpandable for mutations of what
    others read, submodules, and tensors made from Python numbers.
    """
    fake = detect_fake_mode([node.meta["val"] for node in program.graph.nodes if node.meta.get("val") is not None])
    if fake is None:
        raise NotExpandable("no node has a fake value")
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs):
        raise NotExpandable("an output is a mutation")
    graph = Graph()
    made: dict[Node, Any] = {}
    recorder = _Recorder(graph, table)
    with fake, torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "call_function":
                made[node] = recorder.run(node, made)
                continue
            if node.op not in ("placeholder", "output"):
                raise NotExpandable(f"`{node.name}` is a {node.op}")
            new = graph.node_copy(node, lambda one: recorder.node(made[one]))
            new.name = node.name
            if node.op == "placeholder":
                made[node] = recorder.hold(new, node.meta["val"])
    graph.eliminate_dead_code()
    graph.lint()
    module = GraphModule(program.graph_module, graph)
    module.meta.update(program.graph_module.meta)
    signature = copy.copy(program.graph_signature)
    signature.output_specs = _outputs(program, graph)
    return program._update(module, signature)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes each operator that is dispatched into `graph`, unless `table` says what it is made of."""

    def __init__(self, graph: Graph, table: Decompositions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.table = table
        self._graph = graph
        self._nodes: dict[int, Node] = {}
        self._held: list[Tensor] = []  # an id says nothing once its tensor is gone
        self._sharing: defaultdict[int, list[int]] = defaultdict(list)  # memory -> ids of the tensors over it
        self._source: Node | None = None
        self._open: list[Any] = []
        self._muted = False

    def node(self, value: Any) -> Any:
        """The node that gave a tensor; other values are what they are."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            raise NotExpandable(f"`{self._source}` reads a tensor that no call made, or that was mutated under a view")
        return self._nodes[id(value)]

    def hold(self, node: Node, value: Any) -> Any:
        """Remember that `node` gives `value`; what it gives."""
        node.meta["val"] = value
        if isinstance(value, Tensor):
            node.meta["tensor_meta"] = _extract_tensor_metadata(value)
            self._nodes[id(value)] = node
            self._held.append(value)
            self._sharing[_memory(value)].append(id(value))
        elif isinstance(value, tuple | list):
            node.meta["tensor_meta"] = pytree.tree_map_only(Tensor, _extract_tensor_metadata, value)
            for place, one in enumerate(value):
                if isinstance(one, Tensor):
                    part = self._graph.call_function(operator.getitem, (node, place))
                    self._stamp(part)
                    self.hold(part, one)
        return value

    def run(self, node: Node, made: Mapping[Node, Any]) -> Any:
        """The value of a call, whose operators are now in the graph."""
        self._source = node
        args: Any = map_arg(node.args, made.__getitem__)
        kwargs: Any = map_arg(node.kwargs, made.__getitem__)
        target: Any = node.target
        if target is operator.getitem:
            return args[0][args[1]]
        if target is _VIEW and not _viewable(*args):  # its argument came to lie otherwise in memory
            target = _RESHAPE
        elif _stays(target, self.table):
            return self.record(target, args, kwargs)
        with self, _Kept(self):
            value = self.take_apart(target, args, kwargs)
            return target(*args, **kwargs) if value is NotImplemented else value

    def take_apart(self, op: Any, args: Any, kwargs: Any) -> Any:
        """The value of an operator by what `table` says that it is made of; NotImplemented where it says nothing."""
        whole = self.table.get(op)
        if whole is None or op in self._open:  # what takes a composite apart may call it
            return NotImplemented
        self._open.append(op)
        try:
            return whole(*args, **kwargs)
        finally:
            self._open.pop()

    def record(self, op: Any, args: Any, kwargs: Any) -> Any:
        """The value of an operator, which is now in the graph whatever it is made of."""
        if op._schema.is_mutable:
            return self._functional(op, args, kwargs)
        value = self._compute(op, args, kwargs)
        if value is None or (isinstance(value, Tensor) and id(value) in self._nodes):
            return value  # an assertion, which held when the program was captured; an alias
        return self.hold(self._write(op, args, kwargs), value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._muted or func.namespace == "prim":  # prim: what a tensor says of itself
            return func(*args, **kwargs)
        with self:
            value = self.take_apart(func, args, kwargs)
            if value is NotImplemented and _is_composite(func):
                value = func.decompose(*args, **kwargs)
        return self.record(func, args, kwargs) if value is NotImplemented else value

    def _functional(self, op: Any, args: Any, kwargs: Any) -> Any:
        """`x.add_(y)`, where x is a value of this graph: from now on x is `add(x, y)`.

        Other tensors over the same memory are lost: whoever reads one later is refused.
        """
        name = op._schema.name.split("::")[1]
        plain: Any = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), op._overloadname, None)
        if op.namespace != "aten" or not name.endswith("_") or plain is None or plain._schema.is_mutable:
            raise NotExpandable(f"{op} in `{self._source}` mutates its argument")
        changed = args[0]
        self.node(changed)
        sharing = [one for one in self._sharing[_memory(changed)] if one in self._nodes]
        if any(self._nodes[one].op == "placeholder" for one in sharing):
            raise NotExpandable(f"{op} in `{self._source}` mutates an input")
        value = self._compute(plain, args, kwargs)
        if value.shape != changed.shape or value.dtype != changed.dtype:
            raise NotExpandable(f"{op} in `{self._source}` casts its result")
        call = self._write(plain, args, kwargs)
        self.hold(call, value)
        for one in sharing:
            del self._nodes[one]
        self._nodes[id(changed)] = call
        return changed

    def _compute(self, op: Any, args: Any, kwargs: Any) -> Any:
        """The fake value of an operator: nothing of it is written."""
        muted, self._muted = self._muted, True
        try:
            return op(*args, **kwargs)
        finally:
            self._muted = muted

    def _write(self, op: Any, args: Any, kwargs: Any) -> Node:
        call = self._graph.call_function(op, *pytree.tree_map(self.node, (tuple(args), kwargs)))
        self._stamp(call)
        return call

    def _stamp(self, node: Node) -> None:
        assert self._source is not None
        node.meta.update({key: self._source.meta[key] for key in _PROVENANCE if key in self._source.meta})


class _Kept(TorchFunctionMode):
    """Sees a composite operator before dispatch takes it apart: a converter's function may call one that stays."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and _is_composite(func):
            if _stays(func, self._recorder.table):
                return self._recorder.record(func, args, kwargs)
            with self:
                value = self._recorder.take_apart(func, args, kwargs)
            if value is not NotImplemented:
                return value
        return func(*args, **kwargs)


def _stays(target: Any, table: Decompositions) -> bool:
    """Whether a call goes into the graph as it is. torch never keeps a composite that may alias (aten.flatten)."""
    if not isinstance(target, torch._ops.OpOverload) or target in table:
        return False
    return not _is_composite(target) or all(one.alias_info is None for one in target._schema.arguments)


def _is_composite(op: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"))


def _memory(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _viewable(value: Tensor, shape: Any) -> bool:
    try:
        value.view(shape)
    except (RuntimeError, ValueError):
        return False
    return True


def _outputs(program: ExportedProgram, graph: Graph) -> list[OutputSpec]:
    (values,) = graph.output_node().args
    specs = []
    for spec, value in zip(program.graph_signature.output_specs, values, strict=True):  # type: ignore[arg-type]
        argument = TensorArgument(value.name) if isinstance(value, Node) else ConstantArgument("", value)
        specs.append(OutputSpec(spec.kind, argument, spec.target))
    return specs
