"""Weights on their way to a child process: mapped where they lie on the disk, not written and read again.

A graph of gigabytes is saved with a number in each large weight's place and a table of where the real ones are: in the
student's own file, which this process has mapped and no pass has changed, or in a file beside the graph for those that
one has. The child maps them too, so any number of children share one copy in the page cache.
"""

from __future__ import annotations

import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

SMALL_BYTES = 1 << 16
"""What is smaller stays in the graph's file."""
ALIGNMENT = 64
CHUNK_BYTES = 1 << 22


class Place(BaseModel):
    """Where the bytes of one weight are: contiguous, in row-major order, `dtype` as torch names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


def without_weights(program: ExportedProgram, beside: Path) -> tuple[ExportedProgram, dict[str, Place]]:
    """`program` with a number in the place of each large weight, and where those weights are; what lies in no file yet
    is written to `beside`. Weights that share memory share their place."""
    import torch

    places: dict[str, Place] = {}
    written: dict[tuple[int, str, tuple[int, ...]], Place] = {}
    mapped = _Mappings()
    changed: dict[str, dict[str, Any]] = {"state_dict": dict(program.state_dict), "constants": dict(program.constants)}
    with beside.open("wb") as stream:
        for held in changed.values():
            for name, tensor in held.items():
                if not _large(tensor):
                    continue
                key = (tensor.data_ptr(), str(tensor.dtype), tuple(tensor.shape))
                if key not in written:
                    written[key] = mapped.place(tensor) or _write(tensor, beside, stream)
                places[name] = written[key]
                number = torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)
                held[name] = torch.nn.Parameter(number, tensor.requires_grad) if _is_parameter(tensor) else number
    return program._update(program.graph_module, program.graph_signature, **changed), places


def with_weights(program: ExportedProgram, places: dict[str, Place]) -> None:
    """Put the weights back, in place, as copy-on-write maps of their files."""
    import torch

    files: dict[str, Any] = {}
    made: dict[Place, Tensor] = {}
    for name, place in places.items():
        if place not in made:
            if place.file not in files:
                files[place.file] = np.memmap(place.file, dtype=np.uint8, mode="c")
                _mapped.append(files[place.file])
            dtype: torch.dtype = getattr(torch, place.dtype)
            size = int(np.prod(place.shape)) * dtype.itemsize
            raw = files[place.file][place.offset : place.offset + size]
            # Of its own piece of the map: whoever asks for the storage of a tensor gets no neighbours with it.
            made[place] = torch.from_numpy(raw).view(dtype).view(place.shape)
        for held in (program.state_dict, program.constants):
            if name in held:
                old, new = held[name], made[place]
                held[name] = torch.nn.Parameter(new, old.requires_grad) if _is_parameter(old) else new


_mapped: list[Any] = []


def release_pages() -> None:
    """Let go of the memory behind the weights that `with_weights` mapped: they are read again from the page cache when
    somebody asks. To be called when the converter is done with them; nothing is ever written to them."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    for one in _mapped:
        if advice is not None:
            one._mmap.madvise(advice)


def _large(tensor: Any) -> bool:
    import torch

    return (
        isinstance(tensor, torch.Tensor)
        and type(tensor.data) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and tensor.nbytes >= SMALL_BYTES
    )


def _is_parameter(tensor: Tensor) -> bool:
    import torch

    return isinstance(tensor, torch.nn.Parameter)


def _place(tensor: Tensor, file: str, offset: int) -> Place:
    return Place(file=file, offset=offset, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


def _write(tensor: Tensor, beside: Path, stream: BinaryIO) -> Place:
    import torch

    stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
    offset = stream.tell()
    stream.write(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return _place(tensor, str(beside), offset)


class _Range(NamedTuple):
    start: int
    end: int
    offset: int
    file: str


class _Mappings:
    """Files that this process has mapped read-only or copy-on-write, on Linux; elsewhere none is known."""

    def __init__(self) -> None:
        self._ranges = sorted(_mapped_files()) if sys.platform == "linux" else []
        self._starts = [one.start for one in self._ranges]

    def place(self, tensor: Tensor) -> Place | None:
        """Where in which file the bytes of `tensor` are; None where they are in no file, or not as it has them."""
        address = tensor.data_ptr()
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address + tensor.nbytes > self._ranges[at].end:
            return None
        one = self._ranges[at]
        offset = one.offset + address - one.start
        if offset % tensor.itemsize or not _same_bytes(tensor, one.file, offset):
            return None
        return _place(tensor, one.file, offset)


def _mapped_files() -> Iterator[_Range]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith("/") or fields[5].endswith(" (deleted)"):
            continue
        start, end = (int(one, 16) for one in fields[0].split("-"))
        try:
            if os.stat(fields[5]).st_ino != int(fields[4]):  # noqa: PTH116 - the name may hold anything
                continue
        except OSError:
            continue
        yield _Range(start, end, int(fields[2], 16), fields[5])


def _same_bytes(tensor: Tensor, file: str, offset: int) -> bool:
    """Whether the file has what the tensor has: a page that somebody wrote to is this process's own."""
    import torch

    raw = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    buffer = np.empty(CHUNK_BYTES, dtype=np.uint8)
    with open(file, "rb", buffering=0) as stream:  # noqa: PTH123 - the name may hold anything
        stream.seek(offset)
        for start in range(0, len(raw), CHUNK_BYTES):
            part = raw[start : start + CHUNK_BYTES]
            if stream.readinto(buffer[: len(part)].data) != len(part) or not np.array_equal(buffer[: len(part)], part):
                return False
    return True
