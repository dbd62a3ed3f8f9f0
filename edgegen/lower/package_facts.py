"""What is in a saved Core ML package, as data: functions, operations, compute types, weights, states, and its lint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from edgegen.lower.neural_engine import LintReport, lint_outline

if TYPE_CHECKING:
    from edgegen.lower.mil_outline import MilFunction, MilOperation, Value

SUFFIX = ".mlpackage"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArrayFacts(_Model):
    """An input, output or state; a dimension that is open is None."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class FunctionFacts(_Model):
    """`operations` by type, the most frequent first; `computes` is how many of them give each element type."""

    name: str
    inputs: tuple[ArrayFacts, ...]
    outputs: tuple[ArrayFacts, ...]
    states: tuple[ArrayFacts, ...]
    operations: dict[str, int]
    computes: dict[str, int]


class WeightFacts(_Model):
    """Constants of one kind, an element type (`fp16`) or what decompresses them (`constexpr_lut_to_dense`).

    `elements` are those that the program computes with; `bytes` what lies in the file for them, tables included.
    """

    kind: str
    tensors: int
    elements: int
    bytes: int


class PackageFacts(_Model):
    """A `.mlpackage` without its numbers."""

    name: str
    specification_version: int
    operation_sets: tuple[str, ...]
    functions: tuple[FunctionFacts, ...]
    weights: tuple[WeightFacts, ...]
    weight_files: dict[str, int]
    """Bytes by name."""
    lint: LintReport


def is_package(path: Path) -> bool:
    """Whether `path` is meant as a Core ML model: by its name, or because a package's folders are there."""
    return path.suffix in (SUFFIX, ".mlmodelc", ".mlmodel") or (path / "Data" / "com.apple.CoreML").is_dir()


def package_facts(path: Path) -> PackageFacts:
    """Read the `.mlpackage` folder `path`, or one function of it (`mlpackage.function_path`).

    EdgegenError for what is no ML Program, leaves its own folder or has no such function.
    """
    from edgegen.lower.mil_outline import read_outline

    outline = read_outline(path)
    functions = outline.spec.mlProgram.functions
    return PackageFacts(
        name=outline.path.name,
        specification_version=outline.spec.specificationVersion,
        operation_sets=tuple(sorted({one.opset for one in functions.values()})),
        functions=tuple(_function(one) for one in outline.functions),
        weights=_weights(one for function in outline.functions for one in function.operations),
        weight_files=outline.weight_files(),
        lint=lint_outline(outline),
    )


def _function(function: MilFunction) -> FunctionFacts:
    computed = [one for one in function.operations if one.at_run_time]
    types = Counter(
        one.outputs[0].type.element.name for one in computed if one.outputs and one.outputs[0].type is not None
    )
    return FunctionFacts(
        name=function.name,
        inputs=_arrays(function.inputs),
        outputs=_arrays(function.outputs),
        states=_arrays(function.states),
        operations=dict(Counter(one.type for one in computed).most_common()),
        computes=dict(types.most_common()),
    )


def _arrays(values: Iterable[Value]) -> tuple[ArrayFacts, ...]:
    return tuple(
        ArrayFacts(
            name=one.name,
            dtype=one.type.element.name if one.type is not None else "not an array",
            shape=one.type.shape if one.type is not None else (),
        )
        for one in values
    )


def _weights(operations: Iterable[MilOperation]) -> tuple[WeightFacts, ...]:
    """Floating-point constants and compressed ones. What a `constexpr_*` reads counts for it, once where it is shared:
    a constant of the same place in the file may be read by several functions."""
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    bits: Counter[str] = Counter()
    seen: set[tuple[str, int]] = set()
    read: set[tuple[str, str]] = set()
    everything = list(operations)

    def first(value: Value) -> bool:
        blob = value.message.blobFileValue if value.message is not None else None
        if blob is None or not blob.fileName:
            return True
        place = (blob.fileName, blob.offset)
        return place not in seen and not seen.add(place)  # type: ignore[func-returns-value]

    for one in everything:
        if one.decompresses:
            stored = [value for values in one.inputs.values() for value in values if value.message is not None]
            fresh = [value for value in stored if first(value)]
            read |= {(one.function, value.name) for value in stored}
            bits[one.type] += sum(value.stored_bits for value in fresh)
            if fresh:
                tensors[one.type] += 1
                sizes[one.type] += one.outputs[0].elements
    for one in everything:
        if not one.constant or not one.outputs or (one.function, one.outputs[0].name) in read:
            continue
        value = one.outputs[0]
        if value.type is not None and value.type.element.floating and value.elements > 1 and first(value):
            tensors[value.type.element.name] += 1
            sizes[value.type.element.name] += value.elements
            bits[value.type.element.name] += value.stored_bits
    return tuple(
        WeightFacts(kind=kind, tensors=tensors[kind], elements=sizes[kind], bytes=(bits[kind] + 7) // 8)
        for kind, _ in bits.most_common()
    )
