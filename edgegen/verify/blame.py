"""The first op where the reference and a failing artifact part ways, where the backend lets us look inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import module_path, user_inputs
from edgegen.graph.evaluate import evaluate
from edgegen.lower.backend import Array
from edgegen.verify.gates import decibels
from edgegen.verify.metrics import sqnr_db
from edgegen.verify.trajectory import Sample


@runtime_checkable
class Transparent(Protocol):
    """A backend that can say what every value inside an artifact is: name of the value -> array."""

    name: str

    def intermediate_values(self, path: Path, inputs: Mapping[str, Array]) -> dict[str, Array]: ...


@dataclass(frozen=True)
class Verdict:
    """The op to blame: its name in the graph, the aten op, the module it came from, and how far it is off."""

    node: str
    op: str
    module: str
    sqnr_db: float
    compared: int
    """How many values of the graph have a counterpart in the artifact."""

    def __str__(self) -> str:
        where = f" in `{self.module}`" if self.module else ""
        measured = f"{decibels(self.sqnr_db)}, {self.compared} values compared"
        return f"first parts ways at `{self.node}` ({self.op}{where}): {measured}"


def node_values(program: ExportedProgram, inputs: Sequence[Array]) -> dict[str, Array]:
    """Run `program` on its user inputs in order, and keep the value of every node that is one tensor, by its name."""
    names = [node.name for node in user_inputs(program)]
    given = {name: torch.from_numpy(np.array(value)) for name, value in zip(names, inputs, strict=True)}
    values: dict[str, Array] = {}

    def keep(node: Node, value: object) -> None:
        if isinstance(value, torch.Tensor):
            values[node.name] = value.detach().numpy().copy()

    evaluate(program, given, keep)
    return values


def first_divergence(
    program: ExportedProgram, inputs: Sequence[Array], artifact_values: Mapping[str, Array], threshold_db: float
) -> Verdict | None:
    """The first node, in topological order, whose value the artifact does not have within `threshold_db`, or None.

    Nodes and values are paired by name and shape. A converter may renumber: a node also agrees when any value of the
    same shape does, and a node most of whose users agree again was renumbered or fused away, and is not blamed.
    """
    values = node_values(program, inputs)
    by_shape: dict[tuple[int, ...], list[Array]] = {}
    for value in artifact_values.values():
        by_shape.setdefault(value.shape, []).append(value)
    scores: dict[str, float] = {}
    for name, value in values.items():
        other = artifact_values.get(name)
        if other is None or other.shape != value.shape or not np.issubdtype(value.dtype, np.floating):
            continue
        score = sqnr_db(value, other)
        renumbered = score < threshold_db and any(_agree(value, found, threshold_db) for found in by_shape[value.shape])
        scores[name] = threshold_db if renumbered else score
    for node in program.graph.nodes:
        if node.name in scores and scores[node.name] < threshold_db and not _recovers(node, scores, threshold_db):
            return Verdict(node.name, str(node.target), module_path(node), scores[node.name], len(scores))
    return None


def _agree(value: Array, other: Array, threshold_db: float) -> bool:
    """Whether two arrays of one shape agree; a few hundred elements decide against most of them."""
    stride = max(value.size // 256, 1)
    if sqnr_db(value.ravel()[::stride], other.ravel()[::stride]) < threshold_db - 20.0:
        return False
    return sqnr_db(value, other) >= threshold_db


def blame(
    backend: object,
    name: str,
    path: Path,
    program: ExportedProgram,
    inputs: Sequence[str],
    samples: Sequence[Sample],
    threshold_db: float,
) -> str:
    """A sentence about component `name`: the first op that parts ways, or why only the component itself can be named.

    `program` is the fp32 graph of the component, `inputs` the names of its inputs in order; the first sample decides.
    """
    if not isinstance(backend, Transparent):
        label = getattr(backend, "name", "this backend")
        return f"`{name}`: {label} does not let us look inside its artifacts, so the component is all that can be named"
    sample = samples[0]
    try:
        found = backend.intermediate_values(path, sample.inputs)
        verdict = first_divergence(program, [sample.inputs[key] for key in inputs], found, threshold_db)
    except Exception as error:  # blame is a courtesy: it must not hide the failure that it explains
        return f"`{name}`: looking inside failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if verdict is None:
        return (
            f"`{name}`: no single op falls below {threshold_db:g} dB on {sample.label}: "
            "the error builds up, or sits in ops that the converter fused or renamed"
        )
    return f"`{name}` {verdict}"


def _recovers(node: Node, scores: Mapping[str, float], threshold_db: float) -> bool:
    """Whether most of the compared values that depend on `node` agree with the reference after all."""
    seen: set[Node] = set()
    frontier = list(node.users)
    while frontier:
        user = frontier.pop()
        if user not in seen:
            seen.add(user)
            frontier += list(user.users)
    after = [scores[user.name] >= threshold_db for user in seen if user.name in scores]
    return bool(after) and sum(after) * 2 > len(after)
