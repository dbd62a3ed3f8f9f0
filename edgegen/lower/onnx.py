"""ONNX: `torch.onnx.export` over the exported program, executed by onnxruntime on the CPU.

fp16 starts from the half-precision graph: every weight and every tensor between operators is float16, input and output
stay float32, and what the student keeps in float32 (the timestep's features) stays so. A float32 graph converted
afterwards would need a list of operators to spare; the graph already says which those are.

What this host executes is another matter. onnxruntime's CPU provider has few float16 kernels: it casts around float32
ones, and then drops each pair of casts between two of them, so values are not even rounded there. A network of
convolutions runs in float32 from end to end. Parity of an fp16 artifact measured here is therefore that of its float16
weights, and no bound for a provider that computes in float16; `rounded_to_float16_here` says how often a value is
rounded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgegen.cores import cores
from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array, Delegation, Lowered, LowerRequest, Precision
from edgegen.lower.onnx_exact import exact_constants
from edgegen.lower.onnx_fuse import fuse
from edgegen.lower.onnx_optimised import PROVIDER, optimised_graph
from edgegen.lower.onnx_quantize import check_integers, opset_for, quantize_model, refuse, without_dynamic_ranges
from edgegen.lower.onnx_write import write_model
from edgegen.lower.signature import check_call, check_product, check_signature, reason

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# 20 is the first opset with Gelu; onnxruntime since 1.17 and its web build run it.
OPSET = 20
# A protobuf message ends at 2 GB; the margin is for the graph itself.
EXTERNAL_DATA_ABOVE = 2**31 - 2**26
# From here on a single file is written piece by piece, and read by the runtime itself: each copy of it counts.
STREAMED_ABOVE = 2**26
# Model metadata: name of a value in the artifact, by the name of the fx node of the captured graph that it is.
FX_VALUES = "edgegen.fx_values"
DTYPES = {"tensor(float)": "float32", "tensor(int32)": "int32"}


class OnnxExecutable:
    """An onnxruntime session: named arrays in, named arrays out."""

    def __init__(
        self, session: Any, what: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self._session = session
        self._what = what
        self._inputs = inputs
        self._outputs = [spec.name for spec in outputs]

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._session is None:
            raise EdgegenError(f"{self._what} is closed")
        check_call(self._what, inputs, self._inputs)
        try:
            values = self._session.run(self._outputs, dict(inputs))
        except Exception as error:
            raise EdgegenError(f"{self._what} failed while it ran: {reason(error)}") from error
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        self._session = None


class OnnxBackend:
    """`.onnx`, one file under 2 GB; above, `<component>.onnx.data` beside it holds the weights."""

    name = "onnx"
    extra = "onnx"
    suffix = ".onnx"
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    half: Literal["graph", "converter", "storage"] = "graph"
    quantizes: Literal["graph", "file"] = "graph"
    lower_modules = ("torch", "onnx", "onnxscript", "onnxruntime")
    run_modules = ("onnxruntime",)
    distributions = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")

    def lower(self, program: ExportedProgram, request: LowerRequest) -> Lowered:
        """Export, check with onnx's own checker, read the signature back. EdgegenError names the component."""
        import onnx
        import torch

        from edgegen.graph.edit import private_program

        file = f"{request.component}{self.suffix}"
        path = request.out_dir / file
        refuse(request)
        opset = _opset(request)
        program = without_dynamic_ranges(program)
        try:
            with exact_constants():
                exported = torch.onnx.export(
                    private_program(program),
                    (),
                    dynamo=True,
                    optimize=True,
                    verbose=False,
                    opset_version=opset,
                    input_names=[spec.name for spec in request.inputs],
                    output_names=[spec.name for spec in request.outputs],
                )
            assert exported is not None
            model = exported.model
            # Asked for a set it cannot reach, the exporter logs a warning and returns the one it had.
            made = model.opset_imports.get("")
            if made != opset:
                raise EdgegenError(f"opset {opset} was asked for and the exporter gave {made}")
            values = _fx_values(program, exported)
            quantize_model(model, values, request.quantized)
            if request.precision == "fp32":
                fuse(model)
            _strip(model)
            model.metadata_props[FX_VALUES] = json.dumps(values, sort_keys=True)
        except Exception as error:
            raise EdgegenError(f"`{request.component}` cannot be lowered to ONNX: {reason(error)}") from error
        try:
            external = sum(value.const_value.nbytes for value in _initializers(model)) > EXTERNAL_DATA_ABOVE
            with _saved(exported, path, external) as shown:
                onnx.checker.check_model(str(shown), full_check=True)
                check_product(request.component, path)
                # Making the session proves that the provider has a kernel for every operator, and the signature is read
                # back. A large model is opened as it was written, not optimised: that is done when it is executed.
                small = shown == path and not external
                _session_of(shown, path, request.inputs, request.outputs, optimise=small)
        except EdgegenError:
            raise
        except Exception as error:
            raise EdgegenError(f"`{request.component}` cannot be lowered to ONNX: {reason(error)}") from error
        total = sum(1 for _ in model.graph.all_nodes())
        details = {
            "opset": str(opset),
            "ir_version": str(model.ir_version),
            "operators": str(total),
            **(check_integers(request.component, path, request.quantized) if request.quantized else {}),
            "float16": "weights and tensors between operators; inputs and outputs are float32"
            if request.precision == "fp16"
            else "none",
        }
        if external:
            details["external_data"] = f"{file}.data"
        notes: tuple[str, ...] = ()
        if request.precision == "fp16":
            details["rounded_to_float16_here"] = f"{_roundings(path)} of {_half_values(path)} values"
            notes = (
                "onnxruntime's CPU provider computes in float32 and drops most of the rounding between operators: "
                "parity measured here is that of float16 weights, not of float16 arithmetic",
            )
        delegation = Delegation(
            delegate=PROVIDER,
            known=True,
            delegated_ops=total,
            total_ops=total,
            pieces=1,
            note="the CPU provider has a kernel for every operator of the graph; other providers were not asked",
        )
        return Lowered(file=file, delegation=delegation, details=details, notes=notes)

    def not_executed_here(self) -> str | None:
        return None

    def load(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> OnnxExecutable:
        """A session on the CPU; EdgegenError when the file is broken or its signature is not the specs'."""
        what = f"`{path.name}`"
        if not path.is_file():
            raise EdgegenError(f"{what} does not exist")
        return OnnxExecutable(_session_of(path, path, inputs, outputs), what, inputs, outputs)

    def intermediate_values(self, path: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Every value of the artifact that is a node of the captured graph, by that node's name, unoptimised.

        Needs the `onnx` package, unlike `load`. Values of an fp16 artifact come back in float16, and were computed in
        float32 where the CPU provider has no float16 kernel.
        """
        import onnx

        try:
            model = onnx.load(str(path))
        except Exception as error:
            raise EdgegenError(f"`{path.name}` cannot be read: {reason(error)}") from error
        text = next((entry.value for entry in model.metadata_props if entry.key == FX_VALUES), "{}")
        # What a plan compressed has other nodes in its place, and with them other values.
        there = {name for node in model.graph.node for name in node.output}
        there |= {value.name for value in model.graph.input} | {value.name for value in model.graph.initializer}
        by_node: dict[str, str] = {node: name for node, name in json.loads(text).items() if name in there}
        shown = {value.name for value in model.graph.output}
        wanted = [name for name in dict.fromkeys(by_node.values()) if name not in shown]
        # Types are left to onnxruntime's own inference.
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        session = _session(model.SerializeToString(), path, optimise=False)
        names = sorted(set(by_node.values()))
        try:
            values = dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except Exception as error:
            raise EdgegenError(f"`{path.name}` failed while it ran: {reason(error)}") from error
        return {node: values[name] for node, name in by_node.items()}


@contextmanager
def _saved(exported: Any, path: Path, external: bool) -> Iterator[Path]:
    """Write the model to `path`, and give what to look at it by: itself, or for a large one in a single file a small
    model that refers to its weights."""
    size = sum(value.const_value.nbytes for value in _initializers(exported.model))
    if external or size < STREAMED_ABOVE:
        exported.save(str(path), external_data=external)
        yield path
        return
    with write_model(exported.model, path).referring() as small:
        yield small


def _session_of(
    shown: Path, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], optimise: bool = True
) -> Any:
    """A session of the model in `shown`, called after `path`, whose signature is that of the specs."""
    session = _session(shown.read_bytes() if _self_contained(shown) and shown == path else str(shown), path, optimise)
    for side, specs, found in (
        ("inputs", inputs, session.get_inputs()),
        ("outputs", outputs, session.get_outputs()),
    ):
        check_signature(f"`{path.name}`", side, [_spec(tensor, f"`{path.name}`") for tensor in found], specs)
    return session


def _opset(request: LowerRequest) -> int:
    asked = request.options.get("opset", str(opset_for(request, OPSET)))
    if not asked.isdecimal():
        raise EdgegenError(f"`{request.component}` cannot be lowered to ONNX: opset `{asked}` is not a number")
    return int(asked)


def _fx_values(program: ExportedProgram, exported: Any) -> dict[str, str]:
    """Names of the artifact's values by the captured node they equal.

    The exporter decomposes first and names values after the decomposed nodes, whose names may belong to other nodes of
    the captured graph. So: the last decomposed node that stems from a captured one, if its value survived in its shape.
    """
    shapes = {
        node.name: tuple(node.meta["val"].shape)
        for node in program.graph.nodes
        if node.op == "call_function" and hasattr(node.meta.get("val"), "shape")
    }
    artifact: dict[str, Any] = {}
    for node in exported.model.graph:
        for value in node.outputs:
            artifact[value.metadata_props.get("pkg.torch.onnx.original_node_name", value.name)] = value
    last: dict[str, str] = {}
    for node in exported.exported_program.graph.nodes:
        sources = node.meta.get("from_node") or []
        if node.op != "call_function" or not sources:
            continue
        source = sources[-1]
        while source.from_node:
            source = source.from_node[-1]
        last[source.name] = node.name
    values = {}
    for captured, name in last.items():
        value = artifact.get(name)
        if value is None or captured not in shapes or value.shape is None:
            continue
        if tuple(value.shape) == shapes[captured]:
            values[captured] = value.name
    return values


def _strip(model: Any) -> None:
    """Leave module paths, drop everything else the exporter noted: stack traces carry the paths of this machine."""

    def keep(thing: Any, *kept: str) -> None:
        thing.doc_string = None
        for key in [key for key in thing.metadata_props if key not in kept]:
            del thing.metadata_props[key]

    keep(model)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        keep(graph)
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            keep(value)
        for node in graph.all_nodes():
            keep(node, "namespace")
            for value in node.outputs:
                keep(value)


def _initializers(model: Any) -> list[Any]:
    return [value for value in model.graph.initializers.values() if value.const_value is not None]


def _self_contained(path: Path) -> bool:
    """Weights beside the model are found by path; a lone file is read at once, so that no handle stays open on it. Not
    a large one: its bytes would lie in memory beside what the runtime makes of them."""
    return path.stat().st_size < STREAMED_ABOVE and not path.with_name(path.name + ".data").exists()


def _half_values(path: Path) -> int:
    """How many values between operators the artifact declares as float16."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return sum(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 for value in graph.value_info)


def _roundings(path: Path) -> int:
    """Casts to float16 that are left once onnxruntime has optimised the graph for this host's CPU."""
    import onnx

    return sum(
        attribute.i == onnx.TensorProto.FLOAT16
        for node in optimised_graph(path).node
        if node.op_type == "Cast"
        for attribute in node.attribute
        if attribute.name == "to"
    )


def _session(model: bytes | str, path: Path, optimise: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if cores() < (os.cpu_count() or 1):
        options.intra_op_num_threads = cores()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(model, sess_options=options, providers=[PROVIDER])
    except Exception as error:
        raise EdgegenError(
            f"`{path.name}` cannot be loaded by onnxruntime: {reason(error)}",
            hint="the file may be damaged: build it again, or install the onnxruntime that its manifest names",
        ) from error


def _spec(tensor: Any, what: str) -> TensorSpec:
    if tensor.type not in DTYPES or not all(isinstance(size, int) for size in tensor.shape):
        raise EdgegenError(
            f"{what} has `{tensor.name}` as {tensor.type}{tensor.shape}, not a static tensor of a known type"
        )
    return TensorSpec.model_validate({"name": tensor.name, "shape": tuple(tensor.shape), "dtype": DTYPES[tensor.type]})


BACKEND = OnnxBackend()
