"""Core ML: an ML program (`.mlpackage`) made by coremltools on any host, executed by Core ML on macOS and by edgegen's
own evaluator elsewhere.

fp16 is coremltools' own conversion of the float32 graph, except for what computes the timestep's angles: near t = 1000
a float16 step is half a radian, so sines and cosines of such an angle are noise. Those few operations stay in float32.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array, Delegation, Lowered, LowerRequest, Precision
from edgegen.lower.coreml_execute import (
    EVALUATOR,
    EVALUATOR_MODULES,
    CoreMLExecutable,
    EvaluatedExecutable,
    core_ml_is_here,
    open_program,
)
from edgegen.lower.coreml_overflow import frugal_overflow_check
from edgegen.lower.coreml_values import each_value, nodes_of_values, value_stem
from edgegen.lower.mapped_weights import release_pages
from edgegen.lower.mlpackage import (
    operations,
    read_program,
    read_spec,
    shown,
    signature,
    split_function,
    states,
    write_package,
)
from edgegen.lower.neural_engine import lint
from edgegen.lower.signature import check_signature, reason

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

TARGETS = ("iOS16", "iOS17", "iOS18", "iOS26")
DEFAULT_TARGET = "iOS17"
LARGE_BYTES = 1 << 27
_PERIODIC = frozenset({"sin", "cos"})
# What may lie between an angle's source and its sine: shape changes and arithmetic, nothing with weights.
_ANGLE_OPS = frozenset(
    {
        "add",
        "cast",
        "concat",
        "expand_dims",
        "mul",
        "real_div",
        "reshape",
        "slice_by_index",
        "squeeze",
        "stack",
        "sub",
        "tile",
    }
)


class CoreMLBackend:
    """`.mlpackage`, an ML program for iOS 16 and later; option `minimum_deployment_target`."""

    name = "coreml"
    extra = "coreml"
    suffix = ".mlpackage"
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    half: Literal["graph", "converter", "storage"] = "converter"
    quantizes: Literal["graph", "file"] = "graph"
    lower_modules = ("torch", "coremltools")
    run_modules: tuple[str, ...] = ("coremltools",) if core_ml_is_here() else EVALUATOR_MODULES
    distributions = ("torch", "coremltools")

    def lower(self, program: ExportedProgram, request: LowerRequest) -> Lowered:
        """Convert, write the package repeatably, read program and signature back. EdgegenError names the component."""
        import coremltools as ct

        from edgegen.lower.coreml_compress import CompressWeights, check_target, count_compressed
        from edgegen.lower.coreml_state import FIRST_TARGET, check_states, state_details, state_notes
        from edgegen.lower.stored_weight import stored_weights, with_float_weights

        target_name = request.options.get("minimum_deployment_target", DEFAULT_TARGET)
        target = _target(target_name)
        check_target(request.quantized, target_name)
        spared: set[str] = set()
        handles: set[int] = set()
        precision: Any = ct.precision.FLOAT32
        if request.precision == "fp16":
            precision = ct.transform.FP16ComputePrecision(op_selector=_half_unless(spared, handles))
        file = f"{request.component}{self.suffix}"
        path = request.out_dir / file
        try:
            stored = stored_weights(program, request.quantized)
            floats = with_float_weights(program, stored)
            decomposed = _named(_decomposed(floats), request.inputs, request.outputs)
            check_states(decomposed, request.component, int(target) >= int(ct.target[FIRST_TARGET]), target_name)
            calls = _handles(decomposed, {*request.islands, *request.quantized})
            handles |= _with_quantizers(decomposed, {at for at, name in calls.items() if name in request.islands})
            compress = CompressWeights(request.quantized, stored, calls)
            results = [ct.TensorType(name=one.name, dtype=np.dtype(one.dtype).type) for one in request.outputs]
            with frugal_overflow_check():
                model = ct.convert(
                    decomposed,
                    outputs=results,
                    minimum_deployment_target=target,
                    compute_precision=precision,
                    pass_pipeline=compress.pipeline() if request.quantized else None,
                    convert_to="mlprogram",
                    skip_model_load=True,
                )
        except EdgegenError:
            raise
        except Exception as error:
            raise EdgegenError(f"`{request.component}` cannot be lowered to Core ML: {reason(error)}") from error
        release_pages()
        write_package(model.get_spec(), Path(model.weights_dir), path)
        state = state_details(decomposed)
        kept_states = state_notes(decomposed)
        # What is read back is held beside what is let go here.
        del model, decomposed, floats, stored, program
        if sum(one.stat().st_size for one in path.rglob("*")) > LARGE_BYTES:
            gc.collect()

        spec = read_spec(path)
        _check(path, spec, request.inputs, request.outputs)
        if spec.specificationVersion > int(target):
            raise EdgegenError(
                f"`{file}` needs specification {spec.specificationVersion}, above {int(target)} of {target_name}",
                hint="raise `minimum_deployment_target` of the target",
            )
        written = read_program(path, spec)
        census = operations(written)
        details = {
            "minimum_deployment_target": target_name,
            "specification_version": str(spec.specificationVersion),
            "operations": str(census.total()),
            "compute_precision": "float16" if request.precision == "fp16" else "float32",
            **state,
        }
        if request.quantized:
            details |= count_compressed(written, request.quantized, compress.placed, f"`{file}`")
            details["weight_bytes"] = str(sum(one.stat().st_size for one in path.rglob("*.bin")))
        lints = lint(path)
        details |= lints.details()
        notes = kept_states + lints.notes()
        if spared:
            notes += (
                f"kept in float32: {', '.join(sorted(spared))}, which float16 would break "
                "(an angle near 1000 rad is known to half a radian there; other hazards are in the report)",
            )
        delegation = Delegation(
            delegate="neural engine, gpu or cpu, as Core ML decides",
            known=False,
            total_ops=census.total(),
            note="the compute plan that assigns each operation to a unit can be asked for on macOS only",
        )
        return Lowered(file=file, delegation=delegation, details=details, notes=notes)

    def not_executed_here(self) -> str | None:
        """Never a reason: what Core ML does not execute, the evaluator does (see `executed_by`)."""
        return None

    def executed_by(self) -> str | None:
        return None if core_ml_is_here() else EVALUATOR

    def load(
        self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> CoreMLExecutable | EvaluatedExecutable:
        """A model on all compute units on macOS, the evaluator elsewhere. EdgegenError for what is no package, is not
        the specs', or has an operation that is not known."""
        if not core_ml_is_here():
            return self.evaluator(path, inputs, outputs)
        import coremltools as ct

        spec = read_spec(path)
        _check(path, spec, inputs, outputs)
        try:
            package, function = split_function(path)
            model = ct.models.MLModel(str(package), function_name=function)
        except Exception as error:
            raise EdgegenError(f"`{shown(path)}` cannot be loaded: {reason(error)}") from error
        return CoreMLExecutable(model, f"`{shown(path)}`", inputs, outputs, stateful=bool(states(spec, path)))

    def evaluator_missing(self) -> tuple[str, ...]:
        return tuple(module for module in EVALUATOR_MODULES if find_spec(module) is None)

    def evaluator(
        self,
        path: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        accumulate: Literal["fp32", "fp16"] = "fp32",
    ) -> EvaluatedExecutable:
        """The package executed by `mlprogram` on any host; `accumulate` is how it keeps sums of float16 products."""
        _check(path, read_spec(path), inputs, outputs)
        return EvaluatedExecutable(open_program(path, accumulate=accumulate), f"`{shown(path)}`", inputs, outputs)

    def each_value(
        self,
        path: Path,
        inputs: Mapping[str, Array],
        keep: Callable[[str, str, Array], None],
        *,
        arithmetic: Literal["declared", "fp32"] = "declared",
    ) -> None:
        """Compute the package once with the evaluator and show every value by its name in the program."""
        each_value(path, inputs, keep, arithmetic)

    def nodes_of_values(
        self, program: ExportedProgram, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> dict[str, str]:
        """The converter names values after the nodes that it was given: those of `program`, prepared as by `lower`."""
        from edgegen.graph.edit import private_program

        prepared = _named(_decomposed(private_program(program)), inputs, outputs)
        return nodes_of_values(program, prepared, outputs)

    def value_stem(self, name: str) -> str:
        return value_stem(name)


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """Functional, with whole ops where the converter has them; recurrent layers, which its front end for exported
    programs has not, are unrolled over time."""
    import torch
    from torch._decomp import get_decompositions

    aten = torch.ops.aten
    recurrent = [aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input]
    made: ExportedProgram = program.run_decompositions(get_decompositions(recurrent))
    _write_out_tanh_gelus(made.graph)
    return made


def _write_out_tanh_gelus(graph: Graph) -> None:
    """The converter's front end does not read keywords and takes every GELU for the one by erf; written out as its own
    fusion knows it, the one by tanh arrives as one operation of that mode."""
    import torch

    aten = torch.ops.aten
    for gelu in list(graph.nodes):
        if gelu.target is not aten.gelu.default or gelu.kwargs.get("approximate", "none") != "tanh":
            continue

        def call(target: Any, *args: Any, like: Node = gelu) -> Node:
            node = graph.call_function(target, args)
            node.meta = dict(like.meta)
            return node

        (x,) = gelu.args
        with graph.inserting_before(gelu):
            cubic = call(aten.mul.Tensor, call(aten.pow.Tensor_Scalar, x, 3.0), 0.044715)
            argument = call(aten.mul.Tensor, call(aten.add.Tensor, x, cubic), math.sqrt(2 / math.pi))
            gate = call(aten.add.Tensor, call(aten.tanh.default, argument), 1.0)
            half = call(aten.mul.Tensor, gate, 0.5)
        # The node itself stays: the program's signature may know it by its name.
        gelu.target, gelu.args, gelu.kwargs = aten.mul.Tensor, (x, half), {}


def _target(name: str) -> Any:
    import coremltools as ct

    if name not in TARGETS or not hasattr(ct.target, name):
        known = ", ".join(f"`{known}`" for known in TARGETS if hasattr(ct.target, known))
        raise UsageError(f"minimum_deployment_target `{name}` is unknown", hint=f"choose from {known}")
    return ct.target[name]


def _check(path: Path, spec: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    found_inputs, found_outputs = signature(spec, path)
    check_signature(f"`{shown(path)}`", "inputs", found_inputs, inputs)
    check_signature(f"`{shown(path)}`", "outputs", found_outputs, outputs)


def _handles(program: ExportedProgram, names: set[str]) -> dict[int, str]:
    """Number the calls of a decomposed program; the numbers of those that calls named in `names` became, with the
    name."""
    found = {}
    for number, node in enumerate(node for node in program.graph.nodes if node.op == "call_function"):
        node.meta["debug_handle"] = number
        sources = [source.name for source in node.meta.get("from_node") or []]
        # Its own name says nothing: decomposing counts anew, so that `conv2d_1` may be what `conv2d_2` was.
        name = next((one for one in sources or [node.name] if one in names), None)
        if name is not None:
            found[number] = name
    return found


def _with_quantizers(program: ExportedProgram, handles: set[int]) -> set[int]:
    """`handles` and those of what quantizes their values: a cast between the two would take int8 arithmetic away."""
    found = set(handles)
    for node in program.graph.nodes:
        if node.meta.get("debug_handle") not in handles:
            continue
        readers = list(node.users)
        if len(readers) == 1 and str(readers[0].target) == "aten.relu.default":
            found.add(readers[0].meta["debug_handle"])
            readers = list(readers[0].users)
        for one in (*node.all_input_nodes, *readers):
            if str(one.target).startswith("quantized_decomposed."):
                found.add(one.meta["debug_handle"])
    return found


def _half_unless(spared: set[str], handles: set[int]) -> Any:
    """coremltools' `op_selector`: whether an operation becomes float16. Those that lead to an angle do not, nor those
    that came from a call with one of `handles`. Types that stay in float32 end in `spared`."""
    from coremltools.converters.mil.mil.scope import ScopeSource

    def leads_to_angle(operation: Any, seen: set[int]) -> bool:
        if operation.op_type in _PERIODIC:
            return True
        if operation.op_type not in _ANGLE_OPS or id(operation) in seen:
            return False
        seen.add(id(operation))
        return any(leads_to_angle(child, seen) for output in operation.outputs for child in output.child_ops)

    def half(operation: Any) -> bool:
        # A constant follows whoever uses it.
        if operation.op_type == "const":
            return True
        kept = leads_to_angle(operation, set()) or not handles.isdisjoint(
            operation.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE, ())
        )
        if kept:
            spared.add(operation.op_type)
        return not kept

    return half


def _named(
    program: ExportedProgram, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> ExportedProgram:
    """Give the inputs of `program` (decomposed, ours to change) the names of the specs; coremltools takes them over."""
    import torch

    nodes = {node.name: node for node in program.graph.nodes}
    order = program.graph_signature.user_inputs
    if len(order) != len(inputs):
        raise ValueError(f"graph has {len(order)} inputs, the specs name {len(inputs)}")
    holders = [nodes[str(name)] for name in order]

    def rename(node: Any, name: str) -> None:
        old = node.name
        node.name = name
        if node.op == "placeholder":
            node.target = name
        program.graph_signature.replace_all_uses(old, name)

    for holder, spec in zip(holders, inputs, strict=True):
        nodes[holder.name] = holder
        if holder.name != spec.name:
            rename(holder, f"edgegen_input_{spec.name}")
    # A value inside that has the name of an input or output steps aside.
    taken = {spec.name for spec in (*inputs, *outputs)}
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default:  # coremltools knows this no-op by its other name only
            node.target = torch.ops.aten.clone.default
        elif node.target is torch.ops.aten._assert_tensor_metadata.default:  # nothing at run time
            program.graph.erase_node(node)
            continue
        if node.name in taken and node not in holders:
            rename(node, f"edgegen_value_{node.name}")
    for holder, spec in zip(holders, inputs, strict=True):
        if holder.name != spec.name:
            rename(holder, spec.name)
    return program


BACKEND = CoreMLBackend()
