"""One `.mlpackage` with several functions, made of packages with one each; what two of them have in common is stored
once.

`coremltools.utils.save_multifunction` sends every program through the converter again, and takes weights for the same
that differ by 6e-8 or less. Here the programs are copied as they are and only their references into the weight file
change: an entry of a weight file is shared when its type and all of its bytes are the same.

Functions came with specification version 9 (iOS 18, `Model.proto`); weight files are of storage format version 2, as
`mlprogram.blob` reads them.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from edgegen.child import child_main, leave
from edgegen.errors import EdgegenError
from edgegen.lower.mlpackage import (
    FUNCTION_NAME,
    MAIN,
    MODEL_FOLDER,
    function_path,
    read_spec,
    signature,
    write_package,
)

SPECIFICATION = 9
"""The first specification version with several functions in one package."""
_KNOWN = {"text_encoder": "encode", "denoiser": "denoise", "decoder": "decode"}
_PREFIX = "@model_path/"
_WEIGHTS = f"{_PREFIX}weights/weight.bin"
_HEADER = struct.Struct("<II56x")
_METADATA = struct.Struct("<IIQQQ32x")
_SENTINEL, _VERSION, _ALIGNMENT = 0xDEADBEEF, 2, 64


class Part(BaseModel):
    """A package of one function that becomes `function` of the joined one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    function: str
    package: Path


class JoinInChild(BaseModel):
    """What the child is told: the first part is the function that an app gets which asks for none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: tuple[Part, ...]
    package: Path


class Joined(BaseModel):
    """What was made. `weight_bytes` of data lie in the weight file, `separate_bytes` in those of the parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    functions: tuple[str, ...]
    weight_bytes: int
    separate_bytes: int


def function_name(component: str) -> str:
    """What a component's function is called: `encode`, `denoise`, `decode`, else as the component.

    EdgegenError for a component whose name no function can have.
    """
    name = _KNOWN.get(component, component)
    if not re.fullmatch(FUNCTION_NAME, name):
        raise EdgegenError(
            f"component {component[:100]!r} cannot be a function of a package: letters, digits and underscores only"
        )
    return name


def join(parts: Sequence[Part], package: Path) -> Joined:
    """Write `package` with one function a part, in their order, the first one the default. Same in, same bytes.

    EdgegenError when a part is no package of one function or is for a system before iOS 18, and when what was written
    does not read back as what went in.
    """
    from coremltools.proto import Model_pb2

    names = [part.function for part in parts]
    for name in names:
        if not re.fullmatch(FUNCTION_NAME, name) or names.count(name) > 1:
            raise EdgegenError(f"{name[:100]!r} cannot be a function of `{package.name}`, or is one already")
    joined = Model_pb2.Model()
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix=".edgegen-join-", dir=package.parent) as folder:
        weights = _Weights()
        for part in parts:
            spec = _read(part)
            joined.specificationVersion = max(joined.specificationVersion, spec.specificationVersion)
            if part is parts[0]:
                joined.description.metadata.CopyFrom(spec.description.metadata)
                joined.mlProgram.version = spec.mlProgram.version
                for key, value in spec.mlProgram.attributes.items():
                    joined.mlProgram.attributes[key].CopyFrom(value)
            function = joined.mlProgram.functions[part.function]
            function.CopyFrom(spec.mlProgram.functions[MAIN])
            weights.take(function, part.package, stack)
            said = spec.description
            joined.description.functions.add(name=part.function, input=said.input, output=said.output, state=said.state)
        joined.description.defaultFunctionName = names[0]
        weights.write(Path(folder) / "weight.bin")
        write_package(joined, Path(folder), package)
    _check(parts, package)
    return Joined(functions=tuple(names), weight_bytes=weights.stored, separate_bytes=weights.taken)


def _read(part: Part) -> Any:
    what = f"`{part.package.name}`"
    spec = read_spec(part.package)
    if spec.WhichOneof("Type") != "mlProgram" or set(spec.mlProgram.functions) != {MAIN}:
        raise EdgegenError(f"{what} is no ML Program with one function `{MAIN}`, so it cannot be joined")
    if spec.specificationVersion < SPECIFICATION:
        raise EdgegenError(
            f"{what} has specification version {spec.specificationVersion}, functions need {SPECIFICATION} (iOS 18)",
            hint="raise `minimum_deployment_target` of the target to iOS18",
        )
    return spec


def _check(parts: Sequence[Part], package: Path) -> None:
    """Open every function as the evaluator does, which looks each weight up, and hold it against its part."""
    from mlprogram import Program, ProgramError

    spec = read_spec(package)
    for part in parts:
        what = f"function `{part.function}` of `{package.name}`"
        same = signature(spec, function_path(package, part.function)) == signature(
            read_spec(part.package), part.package
        )
        try:
            found, wanted = Program.open(package, function=part.function), Program.open(part.package)
        except ProgramError as error:
            raise EdgegenError(f"{what} cannot be read back: {error}") from error
        if not same or found.operations != wanted.operations:
            raise EdgegenError(f"{what} is not what `{part.package.name}` holds")


class _Weights:
    """The entries of the joined weight file, each once, in the order in which the parts have them."""

    def __init__(self) -> None:
        self.taken = 0
        self.stored = 0
        self._entries: list[tuple[int, int, int, mmap.mmap, int]] = []
        self._offsets: dict[tuple[int, int, int, bytes], int] = {}
        self._end = _ALIGNMENT

    def take(self, function: Any, package: Path, stack: ExitStack) -> None:
        """Add what `function` of `package` refers to, and make it refer to the joined file."""
        values = list(_file_values(function))
        files: dict[str, mmap.mmap] = {}
        moved: dict[tuple[str, int], int] = {}
        for name, offset in sorted({(value.fileName, value.offset) for value in values}):
            if name not in files:
                files[name] = stack.enter_context(_mapped(package, name))
            moved[name, offset] = self._add(files[name], offset, f"`{package.name}`: weight at {offset}")
        for value in values:
            offset = moved[value.fileName, value.offset]
            value.fileName, value.offset = _WEIGHTS, offset

    def write(self, path: Path) -> None:
        """Nothing where nothing was taken."""
        if not self._entries:
            return
        with path.open("wb") as stream:
            stream.write(_HEADER.pack(len(self._entries), _VERSION))
            for code, size, padding, source, start in self._entries:
                stream.write(bytes(-stream.tell() % _ALIGNMENT))
                stream.write(_METADATA.pack(_SENTINEL, code, size, stream.tell() + _ALIGNMENT, padding))
                with memoryview(source) as view:
                    stream.write(view[start : start + size])

    def _add(self, source: mmap.mmap, offset: int, what: str) -> int:
        if offset + _METADATA.size > len(source):
            raise EdgegenError(f"{what} is outside of its file")
        sentinel, code, size, start, padding = _METADATA.unpack_from(source, offset)
        if sentinel != _SENTINEL or start + size > len(source):
            raise EdgegenError(f"{what} is no weight, or is cut off")
        with memoryview(source) as view:
            key = (code, size, padding, hashlib.sha256(view[start : start + size]).digest())
        self.taken += size
        if key not in self._offsets:
            at = self._end + -self._end % _ALIGNMENT
            self._end = at + _ALIGNMENT + size
            self._offsets[key] = at
            self._entries.append((code, size, padding, source, start))
            self.stored += size
        return self._offsets[key]


def _mapped(package: Path, name: str) -> mmap.mmap:
    below = name.removeprefix(_PREFIX)
    if below == name or ".." in below.split("/"):
        raise EdgegenError(f"`{package.name}` keeps weights in `{name}`, which is not in the package")
    try:
        with (package / MODEL_FOLDER / below).open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise EdgegenError(f"weights of `{package.name}` cannot be read: {error}") from error


def _file_values(function: Any) -> Iterator[Any]:
    """Every reference into a weight file; `blobFileValue` messages that can be changed."""
    for block in _blocks(function.block_specializations):
        for operation in block.operations:
            yield from _operation_values(operation)


def _blocks(blocks: Mapping[str, Any]) -> Iterable[Any]:
    return (blocks[key] for key in sorted(blocks))


def _operation_values(operation: Any) -> Iterator[Any]:
    bindings = [one for argument in operation.inputs.values() for one in argument.arguments]
    held = [one.value for one in bindings if one.WhichOneof("binding") == "value"]
    for value in (*operation.attributes.values(), *held):
        if value.WhichOneof("value") == "blobFileValue":
            yield value.blobFileValue
    for block in operation.blocks:
        for inner in block.operations:
            yield from _operation_values(inner)


def work(job: JoinInChild) -> Joined:
    """The child's whole task."""
    return join(job.parts, job.package)


if __name__ == "__main__":
    leave(child_main(sys.argv[1], JoinInChild, work))
