"""A component in several files, run one after another: what is too large for one file, or for memory in one piece.

The artifact is a folder `<component>.chain` with the parts and `chain.json`, which names them in order and says what
each takes and gives. Importing this brings no runtime and no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgegen.errors import EdgegenError
from edgegen.graph.export_lock import EXPORT_LOCK
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.graph.tiles import Tiling, decode_tiled
from edgegen.lower.backend import Array, Backend, Delegation, Executable, Lowered, LowerRequest

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgegen.nursery import Home

Floats = NDArray[np.float32]
SUFFIX = ".chain"
INDEX = "chain.json"
LINKS = 64
"""More parts than this nobody makes."""
FILE_LIMITS = {"tflite": (2**31 - 1, "FlatBuffers has offsets of 32 bits with a sign")}
"""Backend -> the most bytes that one of its files holds, and why."""


class Link(BaseModel):
    """One part: `file` lies in the chain's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Chain(BaseModel):
    """The parts in the order in which they run. What one gives is there for all that follow, by its name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    links: tuple[Link, ...] = Field(min_length=2, max_length=LINKS)


class _Linked:
    """Executes a chain. Where `resident` is False each part is loaded for its turn and let go after it."""

    def __init__(self, backend: Backend, folder: Path, chain: Chain, outputs: Sequence[str], *, resident: bool) -> None:
        self._backend = backend
        self._folder = folder
        self._chain = chain
        self._outputs = tuple(outputs)
        self._loaded: list[Executable] = []
        if resident:
            try:
                for link in chain.links:
                    self._loaded.append(self._load(link))
            except BaseException:
                self.close()
                raise

    def _load(self, link: Link) -> Executable:
        return self._backend.load(self._folder / link.file, link.inputs, link.outputs)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        held = dict(inputs)
        for index, link in enumerate(self._chain.links):
            given = {spec.name: held[spec.name] for spec in link.inputs}
            if self._loaded:
                made = self._loaded[index](given)
            else:
                with closing(self._load(link)) as part:
                    made = part(given)
            held |= made
            later = {spec.name for other in self._chain.links[index + 1 :] for spec in other.inputs}
            held = {name: value for name, value in held.items() if name in later or name in self._outputs}
        return {name: held[name] for name in self._outputs}

    def close(self) -> None:
        while self._loaded:
            self._loaded.pop().close()


class _Tiled:
    """A decoder whose artifact draws one tile: takes the whole latent, gives the whole picture."""

    def __init__(self, inner: Executable, source: str, drawn: str, tiling: Tiling) -> None:
        self._inner = inner
        self._source, self._drawn = source, drawn
        self._tiling = tiling

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        def decode(tile: Floats) -> Floats:
            # A runtime may reuse the memory of what it gave.
            return np.array(self._inner({self._source: tile})[self._drawn], dtype=np.float32)

        latent = np.asarray(inputs[self._source], dtype=np.float32)
        return {self._drawn: decode_tiled(decode, latent, self._tiling)}

    def close(self) -> None:
        self._inner.close()


def load_artifact(
    backend: Backend,
    path: Path,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    resident: bool = True,
    tiling: Tiling | None = None,
) -> Executable:
    """What `backend` executes at `path`, a file, a package or a chain of them; errors as those of `Backend.load`.

    `resident` False: of a chain only the part whose turn it is lies in memory. `tiling`: the artifact takes and gives
    one tile of `inputs` and `outputs`, which are those of the whole.
    """
    if tiling is not None:
        (latent,), (picture,) = inputs, outputs
        inner = load_artifact(backend, path, *tile_specs(latent, picture, tiling), resident=resident)
        return _Tiled(inner, latent.name, picture.name, tiling)
    if path.suffix != SUFFIX:
        return backend.load(path, inputs, outputs)
    return _Linked(backend, path, read_chain(path), [spec.name for spec in outputs], resident=resident)


def tile_specs(
    latent: TensorSpec, picture: TensorSpec, tiling: Tiling
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a decoder's artifact that draws one tile."""
    small = tuple(side * tiling.scale for side in tiling.tile)
    return (
        (latent.model_copy(update={"shape": (*latent.shape[:-2], *tiling.tile)}),),
        (picture.model_copy(update={"shape": (*picture.shape[:-2], *small)}),),
    )


def read_chain(folder: Path) -> Chain:
    """The index of the chain in `folder`; EdgegenError when it is none, or its parts do not fit together."""
    path = folder / INDEX
    try:
        chain = Chain.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EdgegenError(f"`{path}` is no index of a chain: {error}", hint="build the bundle again") from error
    absent = [link.file for link in chain.links if not (folder / link.file).exists()]
    if absent:
        raise EdgegenError(f"`{path}` names `{absent[0]}`, which is not there", hint="build the bundle again")
    return chain


def artifact_files(path: Path) -> tuple[Path, ...]:
    """The files or packages that a backend loads of the artifact at `path`: itself, or the parts of a chain."""
    if path.suffix != SUFFIX:
        return (path,)
    return tuple(path / link.file for link in read_chain(path).links)


def lower_chain(
    backend: str,
    program: ExportedProgram,
    request: LowerRequest,
    log: Path,
    parts: int,
    home: Home | None = None,
) -> Lowered:
    """Lower `program` as `parts` files of about equal weight, each in a child process; one log after another."""
    from edgegen.graph.capture import signature
    from edgegen.graph.cut import cut
    from edgegen.lower.worker import lower_in_child

    folder = f"{request.component}{SUFFIX}"
    links: list[Link] = []
    lowered: list[Lowered] = []
    logs: list[str] = []
    with EXPORT_LOCK:
        pieces = cut(program, parts, [spec.name for spec in request.outputs])
    for index, part in enumerate(pieces, start=1):
        names = {node.name for node in part.program.graph.nodes}
        one = replace(
            request,
            component=f"{request.component}_{index}",
            inputs=signature(part.program),
            outputs=_given(part.program, part.outputs),
            out_dir=request.out_dir / folder,
            islands=tuple(name for name in request.islands if name in names),
            quantized={name: plan for name, plan in request.quantized.items() if name in names},
        )
        own_log = log.with_name(f"{log.stem}-{index}{log.suffix}")
        lowered.append(lower_in_child(backend, part.program, one, own_log, home=home))
        logs.append(f"part {index} of {parts}\n{own_log.read_text(errors='replace')}")
        log.write_text("\n".join(logs))
        links.append(Link(file=lowered[-1].file, inputs=one.inputs, outputs=one.outputs))
    chain = Chain(links=tuple(links))
    (request.out_dir / folder / INDEX).write_text(chain.model_dump_json(indent=2))
    return Lowered(
        file=folder,
        delegation=_together([one.delegation for one in lowered]),
        details=_summed([one.details for one in lowered]),
        notes=tuple(dict.fromkeys(note for one in lowered for note in one.notes)),
    )


def _given(program: ExportedProgram, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    (values,) = program.graph.output_node().args
    assert isinstance(values, tuple | list)
    specs = []
    for name, node in zip(names, values, strict=True):
        value = node.meta["val"]
        kind = "int32" if str(value.dtype) == "torch.int32" else "float32"
        specs.append(TensorSpec.model_validate({"name": name, "shape": tuple(value.shape), "dtype": kind}))
    return tuple(specs)


def _together(parts: Sequence[Delegation]) -> Delegation:
    """Of a whole chain: ops are summed, pieces are those of the part that is cut up most."""
    known = all(one.known for one in parts)
    outside: Counter[str] = Counter()
    for one in parts:
        outside.update(one.undelegated)

    def total(values: Sequence[int | None]) -> int | None:
        return sum(value or 0 for value in values) if known and None not in values else None

    pieces = [one.pieces for one in parts if one.pieces is not None]
    return Delegation(
        delegate=parts[0].delegate,
        known=known,
        delegated_ops=total([one.delegated_ops for one in parts]),
        total_ops=total([one.total_ops for one in parts]),
        pieces=max(pieces) if len(pieces) == len(parts) else None,
        undelegated=dict(outside),
        note="; ".join(dict.fromkeys(one.note for one in parts if one.note)),
    )


def _summed(details: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Facts of the parts as facts of the whole: counts are added, what differs otherwise is listed in order."""
    merged = {"parts": str(len(details))}
    for key in dict.fromkeys(key for one in details for key in one):
        values = [one[key] for one in details if key in one]
        if all(value.isdigit() for value in values) and key.endswith(("_ops", "_weights")):
            merged[key] = str(sum(int(value) for value in values))
        else:
            merged[key] = values[0] if len(set(values)) == 1 else " / ".join(values)
    return merged
