"""ExecuTorch: `to_edge_transform_and_lower` with the XNNPACK partitioner, executed by the runtime of the wheel.

fp16 starts from the half-precision graph: values between operators are float16 behind a float32 boundary, and so are
the weights of linears. The weights and biases of convolutions are not: the partitioner's serializer stores them as
float32 whatever the graph says (ExecuTorch 1.4.1, `op_conv2d.py`), so a network of convolutions does not get smaller.
What XNNPACK computes in inside an operator depends on the CPU. The format has no names for tensors: they go by
position, in the order of the specs, which is the order of the manifest.
"""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache as once
from inspect import isfunction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from edgegen.cores import cores
from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array, Delegation, Lowered, LowerRequest, Precision
from edgegen.lower.collection import without_collection
from edgegen.lower.executorch_quantize import one_dequantize_a_reader, quantized_details, refuse_unrunnable
from edgegen.lower.mapped_weights import release_pages
from edgegen.lower.signature import check_call, check_product, check_signature, reason

if TYPE_CHECKING:
    from torch.export import ExportedProgram

DELEGATE = "XnnpackBackend"
LARGE_BYTES = 1 << 28
METHOD = "forward"
# Codes of c10's ScalarType, as the method's own description gives them.
DTYPES = {6: "float32", 3: "int32"}


class ExecuTorchExecutable:
    """One loaded method: named arrays in the specs' order in, named arrays out."""

    def __init__(
        self, program: Any, method: Any, what: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        # The method reads the program's memory, so both are held.
        self._program = program
        self._method = method
        self._what = what
        self._inputs = inputs
        self._outputs = outputs

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import numpy as np
        import torch

        if self._method is None:
            raise EdgegenError(f"{self._what} is closed")
        check_call(self._what, inputs, self._inputs)
        # require(): the runtime reads the memory directly; it may be neither strided nor read-only.
        tensors = [torch.from_numpy(np.require(inputs[spec.name], requirements=["C", "W"])) for spec in self._inputs]
        try:
            values = self._method.execute(tensors)
        except Exception as error:
            raise EdgegenError(f"{self._what} failed while it ran: {reason(error)}") from error
        return {spec.name: value.numpy() for spec, value in zip(self._outputs, values, strict=True)}

    def close(self) -> None:
        self._method = None
        self._program = None


class ExecuTorchBackend:
    """`.pte` with as much as XNNPACK takes in delegates."""

    name = "executorch"
    extra = "executorch"
    suffix = ".pte"
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    half: Literal["graph", "converter", "storage"] = "graph"
    quantizes: Literal["graph", "file"] = "graph"
    lower_modules = ("torch", "executorch")
    run_modules = ("torch", "executorch")
    distributions = ("torch", "executorch")

    def lower(self, program: ExportedProgram, request: LowerRequest) -> Lowered:
        """Partition, serialise, read the method's description back. EdgegenError names the component."""
        from executorch.exir import to_edge_transform_and_lower

        file = f"{request.component}{self.suffix}"
        path = request.out_dir / file
        refuse_unrunnable(program, request.quantized, request.precision)
        try:
            if request.quantized:
                program = one_dequantize_a_reader(program)
            with without_collection(), _shared_provenance(), _needless_traces_left_out(), _shared_weights():
                edge = to_edge_transform_and_lower(program, partitioner=[_partitioner()])
                partitioned = edge.exported_program()
                delegation = _delegation(partitioned)
                final = edge.to_executorch()
            with path.open("wb") as stream:
                final.write_to_file(stream)
            int8: dict[str, str] = {}
            if request.quantized:
                int8 = quantized_details(path.read_bytes(), program, partitioned, request.quantized)
            # The runtime is about to make its own copies of the weights. What holds ours refers to itself in circles.
            del edge, partitioned, final
            if path.stat().st_size > LARGE_BYTES:
                _forget()
                gc.collect()
                release_pages()
        except EdgegenError:
            raise
        except Exception as error:
            raise EdgegenError(f"`{request.component}` cannot be lowered to ExecuTorch: {reason(error)}") from error
        check_product(request.component, path)
        self.load(path, request.inputs, request.outputs).close()
        details = int8 | {
            "delegate": DELEGATE,
            "method": METHOD,
            "inputs": ", ".join(spec.name for spec in request.inputs),
            "outputs": ", ".join(spec.name for spec in request.outputs),
            "float16": "values between operators and weights of linears; convolution weights and biases are float32"
            if request.precision == "fp16"
            else "none",
        }
        notes: tuple[str, ...] = (
            "tensors of a .pte have no names: they go by position, in the order given in the details",
        )
        if request.precision == "fp16":
            notes += ("XNNPACK's serializer stores convolution weights as float32: fp16 shrinks the linears alone",)
        return Lowered(file=file, delegation=delegation, details=details, notes=notes)

    def not_executed_here(self) -> str | None:
        return None

    def load(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> ExecuTorchExecutable:
        """The `forward` method; EdgegenError when the file is broken or its shapes and dtypes are not the specs'."""
        from executorch.runtime import Runtime

        what = f"`{path.name}`"
        if not path.is_file():
            raise EdgegenError(f"{what} does not exist")
        try:
            _keep_to_cores()
            program = Runtime.get().load_program(path)
            if METHOD not in program.method_names:
                raise EdgegenError(f"{what} has no method `{METHOD}`")
            method = program.load_method(METHOD)
            assert method is not None
            meta = method.metadata
            found_inputs = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
            found_outputs = [meta.output_tensor_meta(i) for i in range(meta.num_outputs())]
        except RuntimeError as error:
            raise EdgegenError(
                f"{what} cannot be loaded by ExecuTorch: {reason(error)}",
                hint="the file may be damaged: build it again, or install the executorch that its manifest names",
            ) from error
        for side, specs, found in (("inputs", inputs, found_inputs), ("outputs", outputs, found_outputs)):
            check_signature(what, side, _specs(what, side, found, specs), specs)
        return ExecuTorchExecutable(program, method, what, inputs, outputs)


@once
def _keep_to_cores() -> None:
    """Its pool is the process's and has a thread for every core of the machine, which is more than a process may have
    that is kept to some of them. Once: methods that are loaded hold the pool that there was."""
    from executorch.extension.pybindings import portable_lib

    if portable_lib._threadpool_get_thread_count() > cores():
        portable_lib._unsafe_reset_threadpool(cores())  # "unsafe" while a method runs


def _specs(what: str, side: str, found: list[Any], specs: tuple[TensorSpec, ...]) -> list[TensorSpec]:
    """What the method says of its tensors, under the specs' names by position."""
    if len(found) != len(specs):
        raise EdgegenError(f"{what} has {len(found)} {side}, expected {len(specs)}")
    named = []
    for info, spec in zip(found, specs, strict=True):
        dtype = DTYPES.get(info.dtype())
        if dtype is None:
            raise EdgegenError(f"{what} has `{spec.name}` with scalar type {info.dtype()}, expected {spec.dtype}")
        named.append(TensorSpec.model_validate({"name": spec.name, "shape": tuple(info.sizes()), "dtype": dtype}))
    return named


def _delegation(program: ExportedProgram) -> Delegation:
    """Counted on the edge graph: operators inside delegates, delegates, and operators left to the portable kernels."""
    pieces, delegated = 0, 0
    outside: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = _operator(node.target)
        if name == "executorch_call_delegate":
            pieces += 1
            lowered = getattr(program.graph_module, node.args[0].target)
            delegated += sum(
                inner.op == "call_function" and _operator(inner.target) != "getitem"
                for inner in lowered.original_module.graph.nodes
            )
        elif name != "getitem":
            outside[name] += 1
    return Delegation(
        delegate=DELEGATE,
        known=True,
        delegated_ops=delegated,
        total_ops=delegated + outside.total(),
        pieces=pieces,
        undelegated=dict(sorted(outside.items())),
        note="counted on the edge graph; views among what stays outside may vanish in memory planning",
    )


def _operator(target: Any) -> str:
    """`aten.native_layer_norm.default` for an edge operator, the plain name for `getitem` and the delegate call."""
    name = getattr(target, "__name__", None) or str(target)
    if name == "executorch_call_delegate" or name == "getitem":
        return name
    return str(target).removeprefix("<EdgeOpOverload: ").partition(">")[0]


def _partitioner() -> Any:
    """XNNPACK's, which wants no say in which ops are decomposed when it would keep all of them: the linears.

    A partitioner that has its say costs one more round of decomposing, with its ops hidden and then brought back.
    """
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class Partitioner(XnnpackPartitioner):  # type: ignore[misc]
        def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[Any], Any]:
            ops, takes = super().ops_to_not_decompose(ep)
            present = [node for node in ep.graph.nodes if node.target in ops]
            linear = torch.ops.aten.linear.default
            # Whether it takes others can only be asked after a round of decomposing.
            if takes is None or not all(node.target is linear and takes(node) for node in present):
                return ops, takes
            return [linear], None

    return Partitioner()


@contextmanager
def _shared_provenance() -> Iterator[None]:
    """Each pass over a graph copies, for each node, the history of its origin, which is longer by one than before.

    Nothing writes to a history once it is made, so a copy may be the thing itself: a fifth of the time.
    """
    from torch.fx.traceback import NodeSource

    if "__deepcopy__" in vars(NodeSource):
        yield
        return
    setattr(NodeSource, "__deepcopy__", lambda self, memo: self)  # noqa: B010 (mypy sees no such attribute)
    try:
        yield
    finally:
        delattr(NodeSource, "__deepcopy__")


def _forget() -> None:
    """Empty the caches that hold a lowered graph, and with it the delegates' copies of the weights."""
    from executorch.exir.backend import utils
    from torch._subclasses import FakeTensorMode

    FakeTensorMode.cache_clear()  # arguments of calls, a delegate among them
    if hasattr(utils.is_same_node, "cache_clear"):
        utils.is_same_node.cache_clear()


@contextmanager
def _shared_weights() -> Iterator[None]:
    """Each subgraph is copied before a delegate may change it, with its weights, though the delegate changes graphs.

    A copy of a program shares the tensors of the program: a fp32 model is held once less.
    """
    from torch import Tensor
    from torch.export import ExportedProgram

    if "__deepcopy__" in vars(ExportedProgram):
        yield
        return

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        for value in (*self.state_dict.values(), *self.constants.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value
        made = object.__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    setattr(ExportedProgram, "__deepcopy__", deepcopy)  # noqa: B010 (mypy sees no such attribute)
    try:
        yield
    finally:
        delattr(ExportedProgram, "__deepcopy__")


@contextmanager
def _needless_traces_left_out() -> Iterator[None]:
    """Most of XNNPACK's passes look for an op, edit the graph, and trace all of it again, found or not.

    A pass that changes nothing while it traces (it overrides none of the hooks) gives the graph that it was given, so
    on a graph that is as the last trace left it there is nothing to do: ten of seventeen passes a delegate.
    """
    from executorch.exir.pass_base import ExportPass
    from torch.fx.passes.infra.pass_base import PassResult

    if "call" in vars(ExportPass):
        yield
        return
    trace = ExportPass.call
    hooks = {name for kind in ExportPass.__mro__ for name, value in vars(kind).items() if isfunction(value)}
    hooks -= {"__init__", "__call__", "call", "requires", "ensures"}
    traced: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()

    def call(self: Any, graph_module: Any) -> Any:
        plain = all(getattr(type(self), name) is getattr(ExportPass, name) for name in hooks)
        if plain and traced.get(graph_module.graph) == _state(graph_module.graph):
            return PassResult(graph_module, True)
        result = trace(self, graph_module)
        made = result.graph_module.graph
        traced[made] = _state(made)
        return result

    ExportPass.call = call
    try:
        yield
    finally:
        del ExportPass.call


def _state(graph: Any) -> tuple[Any, ...]:
    """What a graph computes, and on which values it was last traced."""
    return tuple(
        (node.name, node.op, str(node.target), str(node.args), str(node.kwargs), id(node.meta.get("val")))
        for node in graph.nodes
    )


BACKEND = ExecuTorchBackend()
