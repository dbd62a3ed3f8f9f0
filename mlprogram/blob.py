"""Weight files of ML Programs (`weights/weight.bin`), storage format version 2.

A file is a 64-byte header (entry count, version) and, 64-byte aligned, one record of metadata for each entry, which
says where the entry's bytes are. Elements of fewer than 8 bits are packed from the least significant bit of the first
byte on, across bytes where they do not divide eight.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlprogram.errors import ProgramError
from mlprogram.tensor_type import ElementType

_HEADER = struct.Struct("<II")
_METADATA = struct.Struct("<IIQQQ")
_RECORD = 64
_SENTINEL = 0xDEADBEEF
_VERSION = 2
_AGAIN = "copy the package again, as a whole folder, or convert it again"


class BlobFile:
    """One weight file, mapped: what is not used is not read. ProgramError when it is no such file."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        try:
            with path.open("rb") as stream:
                # Copy on write: torch wants writable memory, and nothing may reach the file.
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ProgramError(f"weight file `{name}` cannot be read: {error}") from error
        self.size = len(self._map)
        if self.size < _RECORD:
            raise ProgramError(f"weight file `{name}` is cut off in its header", _AGAIN)
        _, version = _HEADER.unpack_from(self._map, 0)
        if version != _VERSION:
            raise ProgramError(f"weight file `{name}` has storage version {version}, expected {_VERSION}")

    def find(self, offset: int, element: ElementType, count: int, what: str) -> int:
        """Where the `count` elements begin whose metadata is at `offset`. ProgramError unless they are all there."""
        where = f"{what}: `{self.name}` at {offset}"
        if offset % 8 or offset < _RECORD or offset + _RECORD > self.size:
            raise ProgramError(f"{where} is outside of the file ({self.size} bytes) or not aligned", _AGAIN)
        sentinel, code, size, start, padding = _METADATA.unpack_from(self._map, offset)
        if sentinel != _SENTINEL:
            raise ProgramError(f"{where} is no weight (no sentinel)", _AGAIN)
        if code != element.blob_code:
            raise ProgramError(f"{where} has type code {code}, the program says {element.name}")
        if size != (count * element.bits + 7) // 8:
            raise ProgramError(f"{where} has {size} bytes, {count} elements of {element.name} were expected")
        if element.bits < 8 and padding != size * 8 - count * element.bits:
            raise ProgramError(f"{where} is padded by {padding} bits, expected {size * 8 - count * element.bits}")
        if start % element.numpy.itemsize or start < _RECORD or start + size > self.size:
            raise ProgramError(f"{where} says bytes {start} to {start + size} of a file of {self.size}", _AGAIN)
        return int(start)

    def read(self, start: int, element: ElementType, count: int) -> Tensor:
        """`count` elements from byte `start` on (which `find` gave), flat; a view of the file where possible."""
        if not count:
            return torch.empty(0, dtype=element.storage)
        if element.bits < 8:
            packed = np.frombuffer(self._map, np.uint8, (count * element.bits + 7) // 8, start)
            return unpack(packed, element, count)
        if element.storage.itemsize == element.numpy.itemsize:
            return torch.frombuffer(self._map, dtype=element.storage, count=count, offset=start)
        return torch.from_numpy(np.frombuffer(self._map, element.numpy, count, start).astype(np.int64)).to(
            element.storage
        )


def unpack(packed: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], element: ElementType, count: int) -> Tensor:
    """`count` elements of `element.bits` bits, one byte each."""
    bits = element.bits
    planes = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    values = np.packbits(planes, axis=1, bitorder="little").reshape(count)
    if element.signed:
        sign = 1 << (bits - 1)
        return torch.from_numpy(((values ^ sign).astype(np.int16) - sign).astype(np.int8))
    return torch.from_numpy(values)
