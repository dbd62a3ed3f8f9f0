"""The first op where the reference and an artifact part ways, where the backend lets us look inside.

With the graph that was lowered, value by value against torch. Without it, a float16 artifact against itself in float32
arithmetic: where rounding shows first.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.capture import signature
from edgegen.graph.edit import module_path, user_inputs
from edgegen.graph.evaluate import evaluate
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array
from edgegen.lower.stand_in import Evaluated
from edgegen.verify.gates import decibels
from edgegen.verify.metrics import sqnr_db
from edgegen.verify.trajectory import Sample
from edgegen.verify.values import Values, plain

CLOSED = {
    "executorch": "a delegate is one opaque call, and the published wheel is built without its event tracer",
    "coreai": "its runtime gives what a function returns and nothing of what lies between",
}
"""Backend -> why nothing inside its artifacts can be seen."""
UNPAIRED = {"tflite": "its converter fuses and renames ops and moves channels last"}
"""Backend -> why its values, which can be seen, are not those of the graph's nodes."""


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
    value: str = ""
    """The artifact's own name for it and its op, where that differs."""

    def __str__(self) -> str:
        where = f" in `{self.module}`" if self.module else ""
        own = f", the artifact's {self.value}" if self.value else ""
        measured = f"{decibels(self.sqnr_db)}, {self.compared} values compared"
        return f"first parts ways at `{self.node}` ({self.op}{where}{own}): {measured}"


@dataclass(frozen=True)
class Compared:
    """An artifact's values held against others: `scores` are dB by name, `verdict` the first that failed."""

    verdict: Verdict | None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def lowest(self) -> tuple[str, float] | None:
        """Name and dB of the value that agrees least."""
        return min(self.scores.items(), key=lambda item: item[1], default=None)


def node_values(program: ExportedProgram, inputs: Sequence[Array]) -> dict[str, Array]:
    """Run `program` on its user inputs in order, and keep the value of every node that is one tensor, by its name."""
    values: dict[str, Array] = {}
    _run(program, inputs, lambda node, value: values.update({node.name: value.copy()}))
    return values


def _run(program: ExportedProgram, inputs: Sequence[Array], keep: Callable[[Node, Array], None]) -> None:
    """Run `program` on its user inputs in order; `keep` sees every node that is one tensor."""
    names = [node.name for node in user_inputs(program)]
    given = {name: torch.from_numpy(np.array(value)) for name, value in zip(names, inputs, strict=True)}

    def watch(node: Node, value: object) -> None:
        if isinstance(value, torch.Tensor):
            keep(node, value.detach().numpy())

    evaluate(program, given, watch)


def first_divergence(
    program: ExportedProgram, inputs: Sequence[Array], artifact_values: Mapping[str, Array], threshold_db: float
) -> Verdict | None:
    """The first node, in topological order, whose value the artifact does not have within `threshold_db`, or None.

    Nodes and values are paired by name and shape. A converter may renumber: a node also agrees when any value of the
    same shape does, and a node most of whose users agree again was renumbered or fused away, and is not blamed.
    """
    return compare(program, inputs, artifact_values, threshold_db).verdict


def compare(
    program: ExportedProgram, inputs: Sequence[Array], artifact_values: Mapping[str, Array], threshold_db: float
) -> Compared:
    """`first_divergence`, with the dB of every node that has a counterpart."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, value in artifact_values.items():
        by_shape.setdefault(value.shape, []).append(name)
    scores: dict[str, float] = {}

    def hold(node: Node, value: Array) -> None:
        # At once, so that the values of a large network are never in memory together.
        other = artifact_values.get(node.name)
        if other is None or other.shape != value.shape or not np.issubdtype(value.dtype, np.floating):
            return
        score = _where_finite(value, other)
        renumbered = score < threshold_db and any(
            _agree(value, artifact_values[name], threshold_db) for name in by_shape[value.shape]
        )
        scores[node.name] = threshold_db if renumbered else score

    _run(program, inputs, hold)
    for node in program.graph.nodes:
        if node.name in scores and scores[node.name] < threshold_db and not _recovers(node, scores, threshold_db):
            verdict = Verdict(node.name, str(node.target), module_path(node), scores[node.name], len(scores))
            return Compared(verdict, scores)
    return Compared(None, scores)


def _agree(value: Array, other: Array, threshold_db: float) -> bool:
    """Whether two arrays of one shape agree; a few hundred elements decide against most of them."""
    stride = max(value.size // 256, 1)
    if _where_finite(value.ravel()[::stride], other.ravel()[::stride]) < threshold_db - 20.0:
        return False
    return _where_finite(value, other) >= threshold_db


def _where_finite(value: Array, other: Array) -> float:
    """SQNR where the reference is finite: masks are -inf on purpose. -inf where it is NaN, or only it is infinite."""
    if np.isnan(value).any():
        return -math.inf
    finite = np.isfinite(value)
    if finite.all():
        return sqnr_db(value, other)
    masked, instead = value[~finite], other[~finite]
    # A converter may write a mask of -inf as a very negative number.
    if not (np.array_equal(masked, instead) or (np.less(masked, 0).all() and np.less(instead, -1e4).all())):
        return -math.inf
    return sqnr_db(value[finite], other[finite])


def blame(
    backend: object,
    name: str,
    path: Path,
    program: ExportedProgram | None,
    inputs: Sequence[str],
    samples: Sequence[Sample],
    threshold_db: float,
    *,
    worst_at: str | None = None,
    dump: Path | None = None,
    planned: bool = False,
) -> str:
    """A sentence about component `name`: the first op that parts ways, or why only the component itself can be named.

    `program` is the fp32 graph that was lowered (`planned`: with a plan's quantize and dequantize ops), None where
    there is no model to make it of; `inputs` are the names of its inputs in order. The sample with the label `worst_at`
    decides, else the first. With `dump`, every value that can be seen is left in that folder with an index. A `dump`
    that cannot be written is an EdgegenError; nothing else is.
    """
    if not isinstance(backend, Transparent | Evaluated):
        label = getattr(backend, "name", "this backend")
        why = f" ({CLOSED[label]})" if label in CLOSED else ""
        return (
            f"`{name}`: {label} does not let us look inside its artifacts{why}, "
            "so the component is all that can be named"
        )
    sample = next((one for one in samples if one.label == worst_at), samples[0])
    with tempfile.TemporaryDirectory(prefix="edgegen-blame-") as folder:
        values = Values(dump if dump is not None else Path(folder))
        try:
            if program is None and isinstance(backend, Evaluated):
                found, said = _against_itself(backend, path, sample, values, threshold_db)
            elif program is None:
                _put_all(backend, path, sample, values)
                found = {}
                said = f": {backend.name} artifacts are held against the student, which takes `--model MODEL`"
            else:
                found, said = _against_graph(backend, path, program, inputs, sample, values, threshold_db)
        except Exception as error:  # blame is a courtesy: it must not hide the failure that it explains
            return f"`{name}`: looking inside failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if dump is not None:
            itself = "float32 arithmetic of the artifact itself" if found else None
            with_what = (
                itself
                if program is None
                else ("the student as planned, in torch" if planned else "the student in torch")
            )
            about = {"component": name, "artifact": path.name, "sample": sample.label, "compared_with": with_what}
            values.write_index(about, {value: {"sqnr_db": plain(db)} for value, db in found.items()})
    return f"`{name}`{said}"


def _against_graph(
    backend: Transparent | Evaluated,
    path: Path,
    program: ExportedProgram,
    inputs: Sequence[str],
    sample: Sample,
    values: Values,
    threshold_db: float,
) -> tuple[dict[str, float], str]:
    """dB by name of the artifact's value, and what follows the component's name in the sentence."""
    own_name: dict[str, str] = {}
    if isinstance(backend, Evaluated):
        backend.each_value(path, sample.inputs, values.put)
        outputs = tuple(
            TensorSpec.model_validate({"name": key, "shape": value.shape, "dtype": value.dtype.name})
            for key, value in sample.outputs.items()
        )
        nodes = backend.nodes_of_values(program, signature(program), outputs)
        for value in values:
            node = nodes.get(value) or nodes.get(backend.value_stem(value))
            if node is not None:
                own_name.setdefault(node, value)  # casts of an output come after what computed it
    else:
        _put_all(backend, path, sample, values)
        own_name = {name: name for name in values}
    paired = {node: values[value] for node, value in own_name.items()}
    compared = compare(program, [sample.inputs[key] for key in inputs], paired, threshold_db)
    scores = {own_name[node]: db for node, db in compared.scores.items()}
    verdict = compared.verdict
    if not scores:
        why = f" ({UNPAIRED[backend.name]})" if backend.name in UNPAIRED else ""
        return scores, (
            f": none of the {len(values)} values inside can be told to be a node of the graph{why}, "
            "so the component is all that can be named"
        )
    if verdict is None:
        lowest = compared.lowest
        least = "" if lowest is None else f" (the lowest is {decibels(lowest[1])} at `{lowest[0]}`)"
        return scores, (
            f": no single op falls below {threshold_db:g} dB on {sample.label}{least}: "
            "what error there is builds up, or sits in ops that the converter fused or renamed"
        )
    value = own_name[verdict.node]
    if values.ops[value]:
        verdict = replace(verdict, value=f"`{value}` ({values.ops[value]})")
    return scores, f" {verdict}"


def _put_all(backend: Transparent | Evaluated, path: Path, sample: Sample, values: Values) -> None:
    """Every value of an artifact whose backend gives them all at once."""
    assert isinstance(backend, Transparent)
    for name, array in backend.intermediate_values(path, sample.inputs).items():
        values.put(name, "", array)


def _against_itself(
    backend: Evaluated, path: Path, sample: Sample, values: Values, threshold_db: float
) -> tuple[dict[str, float], str]:
    """As `_against_graph`; the reference is the artifact with nothing rounded to float16."""
    backend.each_value(path, sample.inputs, values.put)
    scores: dict[str, float] = {}
    broken: list[str] = []
    rounds = any(value.dtype == np.float16 for value in values.values())

    def hold(value: str, op: str, wide: Array) -> None:
        if value in scores or value not in values or not np.issubdtype(wide.dtype, np.floating):
            return
        if np.isnan(wide).any():
            broken.append(value)
        scores[value] = _where_finite(wide, values[value])

    backend.each_value(path, sample.inputs, hold, arithmetic="fp32")
    more = "`--model MODEL` names the module, and holds every op against the student"
    if broken:
        return scores, (
            f" first gives NaN at `{broken[0]}` ({values.ops[broken[0]]}), in float32 arithmetic too: "
            f"not rounding, but a weight or what it is given; {more}"
        )
    first = next((value for value, db in scores.items() if db < threshold_db), None)
    lowest = min(scores.items(), key=lambda item: item[1], default=("", math.inf))
    if first is not None:
        return scores, (
            f" first parts from its own float32 arithmetic at `{first}` ({values.ops[first]}): "
            f"{decibels(scores[first])}, {len(scores)} values compared; {more}"
        )
    if not rounds:
        return scores, f": the artifact computes in float32 and all its values are finite; {more}"
    return scores, (
        f": float16 rounding breaks nothing: no value falls below {threshold_db:g} dB of the artifact's own float32 "
        f"arithmetic on {sample.label} (the lowest is {decibels(lowest[1])} at `{lowest[0]}`); {more}"
    )


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
