"""What repairs change: tensors of a canonical graph, named by call and argument, saved beside the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.edit import Editor, weights
from edgegen.graph.evaluate import evaluate
from edgegen.precision.plan import OpPlan, PrecisionPlan
from edgegen.precision.quantize import quantized
from edgegen.precision.repair.stored import packed, unpacked
from edgegen.verify.metrics import sqnr_db

Samples = Sequence[Mapping[str, Tensor]]
Tensors = dict[str, Tensor]
"""`call:place` -> the tensor that the call takes as its argument of that place: a weight, or a bias it did not have.
Calls are those of the canonical graph, which the same student always gives the same names."""


class RepairRecord(BaseModel):
    """What one repair did. SQNR of the quantized graph against the float one it was made of, on the samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    changed: tuple[str, ...]
    """Modules whose weights or biases are others now."""
    before_db: float
    after_db: float
    declined: dict[str, str] = {}
    """Module -> why it was left."""


@dataclass(frozen=True)
class Repaired:
    """The graph with `tensors` in it, and what they did."""

    program: ExportedProgram
    tensors: Tensors
    record: RepairRecord


def apply(program: ExportedProgram, tensors: Mapping[str, Tensor]) -> ExportedProgram:
    """`program` with `tensors`; EdgegenError for a call or a shape that it does not have."""
    editor = Editor(program, "repair")
    calls = {node.name: node for node in editor.nodes()}
    for name, value in tensors.items():
        call, _, place = name.partition(":")
        if call not in calls or not place.isdecimal():
            raise EdgegenError(f"a repaired tensor is for `{name}`, which this graph does not have", hint=_AGAIN)
        _set(editor, calls[call], int(place), value, name)
    return editor.finish() if editor.changes else program


_AGAIN = "make the plan again"


def _set(editor: Editor, node: Node, place: int, value: Tensor, name: str) -> None:
    held = node.args[place] if place < len(node.args) else None
    if isinstance(held, Node):
        if tuple(held.meta["val"].shape) != tuple(value.shape) or editor.value(held) is None:
            raise EdgegenError(f"the repaired tensor of `{name}` has shape {list(value.shape)}", hint=_AGAIN)
        if len(held.users) == 1:
            editor.set_weight(held, value)
            return
    args = [*node.args, *[None] * (place + 1 - len(node.args))]
    with editor.at(node):
        args[place] = editor.constant(value, editor.named(node, f"repaired_{place}"))
    node.args = tuple(args)


def save(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors` as safetensors, those on a grid as their codes (`edgegen.precision.repair.stored`); gives the
    file's sha256."""
    content = serialised(tensors)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def serialised(tensors: Mapping[str, Tensor]) -> bytes:
    """What `save` writes."""
    from safetensors.torch import save as serialise

    made = packed({name: tensors[name].detach().contiguous() for name in sorted(tensors)})
    return bytes(serialise({name: made[name] for name in sorted(made)}))


def tensors_of(path: Path, plan: PrecisionPlan) -> Path | None:
    """The file of tensors that belongs to the plan at `path`, None where no repair changed any; UsageError when it is
    not there."""
    if plan.tensors_sha256 is None:
        return None
    beside = path.with_suffix(".safetensors")
    if not beside.is_file():
        raise UsageError(
            f"`{path}` was made with repairs, whose tensors are not beside it: `{beside.name}`",
            hint="keep the two files together, or make the plan again",
        )
    return beside


def content(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> sha256 of the values: what a cache key needs to know."""
    return {
        name: hashlib.sha256(tensors[name].detach().contiguous().numpy().tobytes()).hexdigest()
        for name in sorted(tensors)
    }


def load(path: Path, sha256: str) -> Tensors:
    """What `save` was given; EdgegenError when the file is not the one that the plan names."""
    from safetensors.torch import load as deserialise

    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise EdgegenError(f"`{path.name}` is not the file that the plan was made with", hint=_AGAIN)
    return unpacked(deserialise(content))


def by_component(tensors: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """`component/call:place` of a plan's file as `call:place` of each component."""
    found: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        component, _, rest = name.partition("/")
        found.setdefault(component, {})[rest] = tensor
    return found


def quality_db(reference: ExportedProgram, program: ExportedProgram, samples: Samples) -> float:
    """SQNR over all samples together, of the first output."""
    pairs = [(evaluate(reference, one)[0].numpy(), evaluate(program, one)[0].numpy()) for one in samples]
    return sqnr_db(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))


def quantized_db(
    reference: ExportedProgram, program: ExportedProgram, ops: Mapping[str, OpPlan], samples: Samples
) -> float:
    """As `quality_db`, of `program` computed as `ops` says (by the names of its calls)."""
    return quality_db(reference, quantized(program, ops), samples)


def seen(program: ExportedProgram, names: set[str], sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of calls, inputs and weights called `names` on one sample."""
    found = {name: value for name, value in {**weights(program), **sample}.items() if name in names}

    def watch(node: Node, value: object) -> None:
        if node.name in names and isinstance(value, Tensor):
            found[node.name] = value

    evaluate(program, sample, watch)
    return {name: value.detach() for name, value in found.items()}


def channel_first(value: Tensor, axis: int) -> Tensor:
    """[C, everything else]."""
    return value.movedim(axis, 0).flatten(1)


def channels(value: Tensor, like: Tensor, axis: int) -> Tensor:
    """A number for each channel, shaped so that it broadcasts along `axis` of `like`."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return value.reshape(shape)


def mean(parts: Sequence[Tensor]) -> Tensor:
    """Of tensors of one shape, in float64."""
    return torch.stack([one.double() for one in parts]).mean(0)
