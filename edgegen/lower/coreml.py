"""Core ML: an ML program (`.mlpackage`) made by coremltools on any host, executed by Core ML on macOS only.

fp16 is coremltools' own conversion of the float32 graph, except for what computes the timestep's angles: near t = 1000
a float16 step is half a radian, so sines and cosines of such an angle are noise. Those few operations stay in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Delegation, Lowered, LowerRequest, Precision
from edgegen.lower.coreml_execute import CoreMLExecutable
from edgegen.lower.mlpackage import operations, read_program, read_spec, signature, write_package
from edgegen.lower.signature import check_signature, reason

if TYPE_CHECKING:
    from torch.export import ExportedProgram

TARGETS = ("iOS16", "iOS17", "iOS18", "iOS26")
DEFAULT_TARGET = "iOS17"
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
_NOT_HERE = (
    "Core ML executes on macOS only; on this host the package is converted, read back and checked for structure, "
    "and a numeric proof without Core ML is not part of this version"
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
    run_modules = ("coremltools",)
    distributions = ("torch", "coremltools")

    def lower(self, program: ExportedProgram, request: LowerRequest) -> Lowered:
        """Convert, write the package repeatably, read program and signature back. EdgegenError names the component."""
        import coremltools as ct

        target_name = request.options.get("minimum_deployment_target", DEFAULT_TARGET)
        target = _target(target_name)
        spared: set[str] = set()
        handles: set[int] = set()
        precision: Any = ct.precision.FLOAT32
        if request.precision == "fp16":
            precision = ct.transform.FP16ComputePrecision(op_selector=_half_unless(spared, handles))
        file = f"{request.component}{self.suffix}"
        path = request.out_dir / file
        try:
            decomposed = _named(program.run_decompositions({}), request.inputs, request.outputs)
            handles |= _handles(decomposed, request.islands)
            model = ct.convert(
                decomposed,
                outputs=[ct.TensorType(name=spec.name, dtype=np.dtype(spec.dtype).type) for spec in request.outputs],
                minimum_deployment_target=target,
                compute_precision=precision,
                convert_to="mlprogram",
                skip_model_load=True,
            )
        except Exception as error:
            raise EdgegenError(f"`{request.component}` cannot be lowered to Core ML: {reason(error)}") from error
        write_package(model.get_spec(), Path(model.weights_dir), path)

        spec = read_spec(path)
        _check(path, spec, request.inputs, request.outputs)
        if spec.specificationVersion > int(target):
            raise EdgegenError(
                f"`{file}` needs specification {spec.specificationVersion}, above {int(target)} of {target_name}",
                hint="raise `minimum_deployment_target` of the target",
            )
        census = operations(read_program(path, spec))
        details = {
            "minimum_deployment_target": target_name,
            "specification_version": str(spec.specificationVersion),
            "operations": str(census.total()),
            "compute_precision": "float16" if request.precision == "fp16" else "float32",
        }
        notes: tuple[str, ...] = ()
        if spared:
            notes = (
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
        return None if sys.platform == "darwin" else _NOT_HERE

    def load(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> CoreMLExecutable:
        """A model on all compute units (macOS); EdgegenError elsewhere, and for a package that is not the specs'."""
        refusal = self.not_executed_here()
        if refusal is not None:
            raise EdgegenError(f"`{path.name}` cannot be executed on this host: {refusal}")
        import coremltools as ct

        _check(path, read_spec(path), inputs, outputs)
        try:
            model = ct.models.MLModel(str(path))
        except Exception as error:
            raise EdgegenError(f"`{path.name}` cannot be loaded: {reason(error)}") from error
        return CoreMLExecutable(model, f"`{path.name}`", inputs, outputs)


def _target(name: str) -> Any:
    import coremltools as ct

    if name not in TARGETS or not hasattr(ct.target, name):
        known = ", ".join(f"`{known}`" for known in TARGETS if hasattr(ct.target, known))
        raise UsageError(f"minimum_deployment_target `{name}` is unknown", hint=f"choose from {known}")
    return ct.target[name]


def _check(path: Path, spec: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    found_inputs, found_outputs = signature(spec, path)
    check_signature(f"`{path.name}`", "inputs", found_inputs, inputs)
    check_signature(f"`{path.name}`", "outputs", found_outputs, outputs)


def _handles(program: ExportedProgram, islands: tuple[str, ...]) -> set[int]:
    """Number the calls of a decomposed program, and give the numbers of those that calls named in `islands` became."""
    found = set()
    for number, node in enumerate(node for node in program.graph.nodes if node.op == "call_function"):
        node.meta["debug_handle"] = number
        sources = node.meta.get("from_node") or []
        if node.name in islands or any(source.name in islands for source in sources):
            found.add(number)
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
