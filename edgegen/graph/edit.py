"""Editing an exported program: new nodes with shapes and provenance, new constants, and a signature that stays true.

An `Editor` works on a private copy; the program that it was given is never changed. Nothing is traced again: a new
node's value is computed once, on fake tensors, where it is made.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.traceback import NodeSource, NodeSourceAction
from torch.utils import _pytree as pytree

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def private_program(program: ExportedProgram) -> ExportedProgram:
    """`program` with a graph of its own; weights are shared.

    Its nodes have no provenance (`from_node`) yet, so that what is made of them can be traced to exactly these nodes.
    """
    module = program.graph_module
    graph = _copied(module.graph)
    for node in graph.nodes:
        node.meta.pop("from_node", None)
    owned = GraphModule(module, graph)
    owned.meta.update(module.meta)
    return program._update(owned, copy.deepcopy(program.graph_signature))


def weights(program: ExportedProgram) -> dict[str, Tensor]:
    """Placeholder name -> the parameter, buffer or constant that it stands for."""
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in _WEIGHTS and spec.target is not None:
            held = program.state_dict if spec.target in program.state_dict else program.constants
            found[spec.arg.name] = held[spec.target]
    return found


def user_inputs(program: ExportedProgram) -> list[Node]:
    """The placeholders of what a caller passes, in order."""
    names = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def module_path(node: Node) -> str:
    """Dotted path of the module that a node came from, "" for the root: what plans and reports name nodes by."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return str(path).removeprefix("L['self'].").removeprefix("L__self__.")


def made_by(node: Node) -> tuple[str, ...]:
    """Names of the passes that made `node`, the latest first; () for a node of the capture."""
    sources: list[NodeSource] = node.meta.get("from_node") or []
    names = []
    while sources:
        source = sources[-1]
        if source.pass_name and NodeSourceAction.CREATE in source.action:
            names.append(source.pass_name)
        sources = source.from_node
    return tuple(names)


def apply(node: Node, value: Callable[[Node], Any]) -> Any:
    """The result of a call when each node among its arguments stands for `value(node)`."""
    args: Any = map_arg(node.args, value)
    kwargs: Any = map_arg(node.kwargs, value)
    assert callable(node.target)
    return node.target(*args, **kwargs)


class Editor:
    """One pass's hands on one graph. `by` is the pass's name, which every node it makes carries.

    `call` and `constant` make nodes before the node given to `at`; `finish` removes what nothing reads and returns the
    edited program. User inputs stay unless `drop_input` or `replace_input` takes them out.
    """

    def __init__(self, program: ExportedProgram, by: str) -> None:
        self._source = program
        self._by = by
        module = program.graph_module
        self.graph: Graph = _copied(module.graph)
        self._meta = dict(module.meta)
        self._specs = {spec.arg.name: copy.copy(spec) for spec in program.graph_signature.input_specs}
        self._user_outputs = copy.deepcopy(program.graph_signature.output_specs)
        outer = program.module_call_graph[0].signature
        assert outer is not None
        self._returned = outer.out_spec
        self._state: dict[str, Tensor] = dict(program.state_dict)
        self._constants: dict[str, Any] = dict(program.constants)
        self._values = weights(program)
        fake = detect_fake_mode([node.meta["val"] for node in self.graph.nodes if node.meta.get("val") is not None])
        self._fake: FakeTensorMode = fake if fake is not None else FakeTensorMode()
        self._anchor: Node | None = None
        self._new_readers: set[Node] = set()  # of a value that lies otherwise in memory than what they read before
        self.changes = 0

    def nodes(self, *targets: Any) -> list[Node]:
        """Calls of `targets` (all calls without one) in order; safe to edit while going through them."""
        calls = [node for node in self.graph.nodes if node.op == "call_function"]
        return [node for node in calls if not targets or node.target in targets]

    def value(self, node: Any) -> Tensor | None:
        """The weight that a placeholder stands for, or None."""
        return self._values.get(node.name) if isinstance(node, Node) else None

    @contextmanager
    def at(self, node: Node) -> Iterator[None]:
        """New nodes go before `node` and come from where it came from."""
        outer, self._anchor = self._anchor, node
        try:
            yield
        finally:
            self._anchor = outer

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new call, with its value computed on fake tensors. Errors are those of the op on wrong arguments."""
        assert self._anchor is not None, "a call is made inside `at`"
        with self.graph.inserting_before(self._anchor):
            node = self.graph.call_function(target, args, kwargs)
        self.propagate(node)
        self._stamp(node, self._anchor)
        self.changes += 1
        return node

    def propagate(self, node: Node) -> None:
        """Compute the value of a call anew, after its arguments changed."""
        with self._fake, torch.no_grad():
            node.meta["val"] = apply(node, lambda arg: arg.meta["val"])
        node.meta.pop("tensor_meta", None)

    def constant(self, value: Tensor, name: str) -> Node:
        """A new weight; `name` is a dotted path like a parameter's, made unique when it is taken."""
        value = value.detach().contiguous()
        if value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()  # a part of a weight: saved as it is, it would bring the whole along
        name = name.strip(".")
        target, number = name, 1
        while target in self._state or target in self._constants:
            number += 1
            target = f"{name}_{number}"
        placeholder = self._placeholder(f"p_{target}", value)
        floating = value.is_floating_point()
        self._state[target] = torch.nn.Parameter(value, requires_grad=False) if floating else value
        kind = InputKind.PARAMETER if floating else InputKind.BUFFER
        persistent = None if floating else True
        spec = InputSpec(kind, TensorArgument(placeholder.name), target=target, persistent=persistent)
        self._specs[placeholder.name] = spec
        self._values[placeholder.name] = value
        self.changes += 1
        return placeholder

    def set_weight(self, node: Node, value: Tensor) -> None:
        """Give the weight behind the placeholder `node` other values or another dtype; name and shape stay."""
        target = self._specs[node.name].target
        assert target is not None and value.shape == node.meta["val"].shape
        held = self._state if target in self._state else self._constants
        as_parameter = isinstance(held[target], torch.nn.Parameter)
        value = value.detach()
        held[target] = torch.nn.Parameter(value, requires_grad=False) if as_parameter else value
        self._values[node.name] = value
        node.meta["val"] = self._fake.from_tensor(value, static_shapes=True)
        node.meta.pop("tensor_meta", None)
        self.changes += 1

    def named(self, node: Node, suffix: str) -> str:
        """A name for a new constant: the module path of `node` and `suffix`."""
        path = module_path(node)
        return f"{path}.{suffix}" if path else suffix

    def replace(self, old: Node, new: Node) -> None:
        """Everything that reads `old`, the graph's output included, reads `new`."""
        if _strides(old.meta.get("val")) != _strides(new.meta.get("val")):
            self._new_readers.update(old.users)
        old.replace_all_uses_with(new)
        self.changes += 1

    def drop_input(self, node: Node) -> None:
        """Take a user input that nothing reads out of the signature."""
        assert not node.users, f"{node.name} is read"
        del self._specs[node.name]
        self.graph.erase_node(node)
        self.changes += 1

    def replace_input(self, old: Node, name: str, example: Tensor) -> Node:
        """A user input of another name, shape or dtype in the place of `old`, which must have no reader by the end."""
        with self.graph.inserting_before(old):
            node = self.graph.placeholder(name)
        node.meta["val"] = self._fake.from_tensor(example, static_shapes=True)
        self._stamp(node, old)
        order = list(self._specs.items())
        place = [name for name, _ in order].index(old.name)
        order.insert(place, (node.name, InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), target=None)))
        self._specs = dict(order)
        self.changes += 1
        return node

    def add_input(self, name: str, example: Tensor) -> Node:
        """A further user input, the last; inside `at` it comes from where that node came from."""
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(re.sub(r"\W", "_", name))
        node.meta["val"] = self._fake.from_tensor(example, static_shapes=True)
        if self._anchor is not None:
            self._stamp(node, self._anchor)
        self._specs[node.name] = InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), target=None)
        self.changes += 1
        return node

    def set_outputs(self, nodes: Sequence[Node]) -> None:
        """The program returns `nodes`: one tensor, or a tuple of several."""
        self.graph.output_node().args = (tuple(nodes),)
        self._user_outputs = [
            OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), target=None) for node in nodes
        ]
        self._returned = pytree.tree_structure(0 if len(nodes) == 1 else (0,) * len(nodes))
        self.changes += 1

    def rename_inputs(self, names: Sequence[str]) -> None:
        """Give the user inputs these names, in order; a call that has one of them gets another."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder" and not self._is_weight(node)]
        taken = {node.name: node for node in self.graph.nodes if node not in inputs}
        for name in names:
            if name in taken:
                spec = self._specs.pop(name, None)
                taken[name]._rename(f"{name}_")
                if spec is not None:
                    spec.arg = TensorArgument(taken[name].name)
                    self._specs[taken[name].name] = spec
        for node in inputs:
            del self._specs[node.name]
        for node, name in zip(inputs, names, strict=True):
            # Set, not asked for: fx would number a name that it has given out before, or that is Python's.
            node.name = node.target = name
            self.graph._graph_namespace._used_names.add(name)
            self._specs[name] = InputSpec(InputKind.USER_INPUT, TensorArgument(name), target=None)
        self.changes += 1

    def finish(self) -> ExportedProgram:
        """The edited program: dead calls and unread weights are gone, everything is where its readers need it."""
        self.sweep()
        self._restride()
        for node in [node for node in self.graph.nodes if node.op == "placeholder" and not node.users]:
            if self._specs[node.name].kind in _WEIGHTS:
                del self._specs[node.name]
                self.graph.erase_node(node)
        self.graph.lint()
        module = GraphModule(self._source.graph_module, self.graph)
        module.meta.update(self._meta)
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        specs = [self._specs[node.name] for node in placeholders]
        kept = {spec.target for spec in specs}
        signature = ExportGraphSignature(specs, self._outputs())
        inputs = [node for node in placeholders if self._specs[node.name].kind is InputKind.USER_INPUT]
        return ExportedProgram(
            root=module,
            graph=self.graph,
            graph_signature=signature,
            state_dict={name: value for name, value in self._state.items() if name in kept},
            range_constraints=copy.deepcopy(self._source.range_constraints),
            module_call_graph=[ModuleCallEntry("", self._entry(inputs))],
            example_inputs=(tuple(_example(node) for node in inputs), {}),
            constants={name: value for name, value in self._constants.items() if name in kept},
            verifiers=self._source.verifiers,
        )

    def sweep(self) -> None:
        """Take out calls that nothing reads; asserts and calls that mutate stay."""
        self.graph.eliminate_dead_code(is_impure_node=_has_effect)

    def _restride(self) -> None:
        """Values may lie otherwise in memory after a rewrite: propagate that, reshape what can no longer be viewed."""
        dirty: set[Node] = set()
        for node in self.nodes():
            moved = any(one in dirty for one in node.all_input_nodes) or node in self._new_readers
            if not moved:
                continue
            before = _strides(node.meta["val"])
            if node.target is torch.ops.aten.view.default and not self._viewable(node):
                node.target = torch.ops.aten.reshape.default
                self._stamp(node, node)
                self.changes += 1
            self.propagate(node)
            if _strides(node.meta["val"]) != before:
                dirty.add(node)

    def _viewable(self, node: Node) -> bool:
        try:
            self.propagate(node)
        except (RuntimeError, ValueError):
            return False
        return True

    def _placeholder(self, name: str, value: Tensor) -> Node:
        first = next(node for node in self.graph.nodes if not self._is_weight(node))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(re.sub(r"\W", "_", name))
        node.meta["val"] = self._fake.from_tensor(value, static_shapes=True)
        if self._anchor is not None:
            self._stamp(node, self._anchor)
        return node

    def _is_weight(self, node: Node) -> bool:
        return node.op == "placeholder" and node.name in self._specs and self._specs[node.name].kind in _WEIGHTS

    def _stamp(self, node: Node, source: Node) -> None:
        for key in ("nn_module_stack", "stack_trace"):
            if key in source.meta:
                node.meta[key] = source.meta[key]
        node.meta["from_node"] = [NodeSource(source, self._by, NodeSourceAction.CREATE)]

    def _outputs(self) -> list[OutputSpec]:
        (values,) = self.graph.output_node().args
        made = []
        for spec, value in zip(self._user_outputs, values, strict=True):  # type: ignore[arg-type]
            assert spec.kind is OutputKind.USER_OUTPUT, f"{spec.kind} cannot be edited"
            argument = TensorArgument(value.name) if isinstance(value, Node) else ConstantArgument("", value)
            made.append(OutputSpec(OutputKind.USER_OUTPUT, argument, spec.target))
        return made

    def _entry(self, inputs: list[Node]) -> ModuleCallSignature:
        """As torch.export has it: a root entry that named nodes would be wrong once ExecuTorch renames them."""
        return ModuleCallSignature(
            inputs=[],
            outputs=[],
            in_spec=pytree.tree_structure((tuple(range(len(inputs))), {})),
            out_spec=self._returned,
            forward_arg_names=[node.name for node in inputs],
        )


def _copied(graph: Graph) -> Graph:
    """A copy whose nodes have the same names; fx's own renames those that are Python's, as an input called `input`."""
    copied = Graph(tracer_cls=graph._tracer_cls)
    end: Any = copied.graph_copy(graph, {}, return_output_node=True)
    values, output = end
    copied.output(values, type_expr=output.type).meta = copy.copy(output.meta)
    copied._codegen = graph._codegen
    for node, source in zip(copied.nodes, graph.nodes, strict=True):
        node.name = source.name
    return copied


def _has_effect(node: Node) -> bool:
    """fx's own rule, but that a random call has none: attention and dropout count as random, whatever they drop."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
        return bool(target._schema.is_mutable)
    return bool(node.is_impure())


def _strides(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_strides(one) for one in value]
    return tuple(value.stride()) if isinstance(value, Tensor) else None


def _example(node: Node) -> Any:
    value = node.meta["val"]  # no tensor where a caller passes a constant, as None
    return torch.zeros(tuple(value.shape), dtype=value.dtype) if isinstance(value, Tensor) else value
