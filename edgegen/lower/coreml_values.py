"""The values inside a Core ML package, and the nodes of the graph that they are the values of.

A package keeps no module paths, and keeps names: coremltools calls a value as the node is called that it was made from,
and appends `_cast_fp16` where it computes in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array
from edgegen.lower.coreml_execute import watched

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from mlprogram import Operation

_APPENDED = ("_cast_fp16", "_cast_fp32")


def each_value(
    path: Path,
    inputs: Mapping[str, Array],
    keep: Callable[[str, str, Array], None],
    arithmetic: Literal["declared", "fp32"] = "declared",
) -> None:
    """Compute the package at `path` once; `keep` sees every value by name, the op's type, and the array."""

    def watch(operation: Operation, values: tuple[Array, ...]) -> None:
        for (name, _), value in zip(operation.outputs, values, strict=True):
            keep(name, operation.type, value)

    watched(path, inputs, watch, arithmetic)


def value_stem(name: str) -> str:
    """A value's name without what the converter appended to the node's."""
    for end in _APPENDED:
        name = name.removesuffix(end)
    return name


def nodes_of_values(
    program: ExportedProgram, prepared: ExportedProgram, outputs: tuple[TensorSpec, ...]
) -> dict[str, str]:
    """Name of a value (its stem) -> node of `program`, where one value of the package is one node's.

    `prepared` is what the converter was given, made of `program` without further provenance. A node that became several
    is known by the last of them, if that has the node's shape. A name that the converter had to make unique ends in
    `_0`.
    """
    shapes = {
        node.name: tuple(node.meta["val"].shape)
        for node in program.graph.nodes
        if node.op == "call_function" and hasattr(node.meta.get("val"), "shape")
    }
    found: dict[str, str] = {}
    origin: dict[str, str] = {}
    for node in prepared.graph.nodes:
        sources = node.meta.get("from_node") or []
        value = node.meta.get("val")
        if node.op != "call_function" or not sources or not hasattr(value, "shape"):
            continue
        source = sources[-1]
        while source.from_node:
            source = source.from_node[-1]
        if shapes.get(source.name) == tuple(value.shape):
            origin[source.name] = node.name
    for source_name, name in origin.items():
        found[name] = source_name
        found.setdefault(f"{name}_0", source_name)
    returned = next(node for node in reversed(program.graph.nodes) if node.op == "output").args[0]
    for spec, node in zip(outputs, returned[-len(outputs) :], strict=True):
        found[spec.name] = node.name
    return found
