"""ExecuTorch: `to_edge_transform_and_lower` with the XNNPACK partitioner, executed by the runtime of the wheel.

fp16 starts from the half-precision graph: values between operators are float16 behind a float32 boundary, and so are
the weights of linears. The weights and biases of convolutions are not: the partitioner's serializer stores them as
float32 whatever the graph says (ExecuTorch 1.4.1, `op_conv2d.py`), so a network of convolutions does not get smaller.
What XNNPACK computes in inside an operator depends on the CPU. The format has no names for tensors: they go by
position, in the order of the specs, which is the order of the manifest.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array, Delegation, Lowered, LowerRequest, Precision
from edgegen.lower.signature import check_call, check_product, check_signature, reason

if TYPE_CHECKING:
    from torch.export import ExportedProgram

DELEGATE = "XnnpackBackend"
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
    half_graph = True
    lower_modules = ("torch", "executorch")
    run_modules = ("torch", "executorch")
    distributions = ("torch", "executorch")

    def lower(self, program: ExportedProgram, request: LowerRequest) -> Lowered:
        """Partition, serialise, read the method's description back. EdgegenError names the component."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        file = f"{request.component}{self.suffix}"
        path = request.out_dir / file
        try:
            with _no_collection():
                edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
                delegation = _delegation(edge.exported_program())
                final = edge.to_executorch()
            with path.open("wb") as stream:
                final.write_to_file(stream)
        except Exception as error:
            raise EdgegenError(f"`{request.component}` cannot be lowered to ExecuTorch: {reason(error)}") from error
        check_product(request.component, path)
        self.load(path, request.inputs, request.outputs).close()
        details = {
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


@contextmanager
def _no_collection() -> Iterator[None]:
    """Lowering makes millions of short-lived graph objects: without the cycle collector it takes a sixth less time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


BACKEND = ExecuTorchBackend()
