"""Containers from strangers: zip archives and JSON files, read under caps and without running anything.

torch writes its archives (`.pt`, `.pt2`) without compression, so the rule here is stricter than a ratio: a compressed
entry is refused, entries may not overlap, and together they may not exceed the file. A bomb has no room left; weights
of many gigabytes pass.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from edgegen.errors import EdgegenError, UnsafeError

MAX_ENTRIES = 100_000
MAX_DIRECTORY_BYTES = 64 << 20
MAX_JSON_BYTES = 64 << 20
MAX_PICKLE_BYTES = 64 << 20

STORE_HINT = "write the file again with `torch.save` or `torch.export.save`, which store entries as they are"
DAMAGED_HINT = "copy or download the file again, and compare its size and sha256 with the original's"

EXPORT_HINT = "in the code that made it, `torch.export.save(torch.export.export(module, inputs), 'model.pt2')`"

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")


@dataclass(frozen=True)
class Archive:
    """A checked torch archive: every entry stored, contained in one root folder, apart from the others."""

    name: str
    source: Path | bytes
    root: str
    sizes: Mapping[str, int]
    """Entry below the root -> bytes."""

    def read(self, entry: str, cap: int) -> bytes:
        """The bytes of one entry, CRC checked; EdgegenError when it is missing, larger than `cap` or damaged."""
        if entry not in self.sizes:
            raise EdgegenError(f"`{self.name}` has no entry `{entry}`", hint=DAMAGED_HINT)
        if self.sizes[entry] > cap:
            raise UnsafeError(f"`{entry}` in `{self.name}` is {self.sizes[entry]} bytes, more than the {cap} allowed")
        try:
            with _open(self.source) as stream, zipfile.ZipFile(stream) as file:
                return file.read(f"{self.root}/{entry}" if self.root else entry)
        except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, struct.error, EOFError) as error:
            raise EdgegenError(f"`{entry}` in `{self.name}` is damaged: {error}", hint=DAMAGED_HINT) from error


def _open(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def open_archive(source: Path | bytes, name: str) -> Archive:
    """Check a zip archive's directory against the caps; nothing but the directory is read.

    Raises UnsafeError for a bomb, overlapping or escaping entries; EdgegenError for a file that is cut off or damaged.
    """
    try:
        with _open(source) as stream:
            length = stream.seek(0, io.SEEK_END)
            _check_directory(stream, length, name)
            stream.seek(0)
            with zipfile.ZipFile(stream) as file:
                infos = file.infolist()
    except (
        zipfile.BadZipFile,
        OSError,
        ValueError,
        NotImplementedError,
        struct.error,
        OverflowError,
        EOFError,
    ) as error:
        raise EdgegenError(f"`{name}` is a truncated or damaged zip archive: {error}", hint=DAMAGED_HINT) from error
    return _check_entries(infos, length, source, name)


def _check_directory(stream: BinaryIO, length: int, name: str) -> None:
    """The zip's end records must sit at the very end, agree with each other and be small.

    Readers differ in how they search for them; where there is one place to look, there is one answer.
    """
    tail = min(length, _END.size + _LOCATOR.size + _END64.size)
    stream.seek(length - tail)
    data = stream.read(tail)
    if len(data) < _END.size:
        raise zipfile.BadZipFile("the central directory at its end is missing")
    magic, _, _, _, count, size, offset, comment = _END.unpack(data[-_END.size :])
    if magic != b"PK\x05\x06" or comment:
        raise zipfile.BadZipFile("the central directory at its end is missing")
    end = length - _END.size
    locator = data[-_END.size - _LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\x06\x07":
        end = length - tail
        if _LOCATOR.unpack(locator)[2] != end or data[:4] != b"PK\x06\x06" or len(data) != tail:
            raise zipfile.BadZipFile("its zip64 records disagree")
        count64, size64, offset64 = _END64.unpack(data[: _END64.size])[7:10]
        for small, large, limit in ((count, count64, 0xFFFF), (size, size64, 1 << 32), (offset, offset64, 1 << 32)):
            if small not in (large, 0xFFFF if limit == 0xFFFF else 0xFFFFFFFF):
                raise zipfile.BadZipFile("its zip and zip64 records disagree")
        count, size, offset = count64, size64, offset64
    if count > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES:
        raise UnsafeError(
            f"`{name}` claims {count} zip entries, more than the {MAX_ENTRIES} allowed: it may be a zip bomb",
            hint=STORE_HINT,
        )
    if offset + size != end:
        raise zipfile.BadZipFile("its central directory is not where its end record says")


def _check_entries(infos: list[zipfile.ZipInfo], length: int, source: Path | bytes, name: str) -> Archive:
    if not infos:
        raise EdgegenError(f"`{name}` is a zip archive without entries", hint=DAMAGED_HINT)
    if len(infos) > MAX_ENTRIES:
        raise UnsafeError(
            f"`{name}` has {len(infos)} zip entries, more than the {MAX_ENTRIES} allowed: it may be a zip bomb",
            hint=STORE_HINT,
        )
    _refuse_torchscript([info.filename for info in infos], name)
    for info in infos:
        check_relative(info.orig_filename, f"an entry of `{name}`")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            ratio = info.file_size / max(info.compress_size, 1)
            raise UnsafeError(
                f"`{name}` holds a compressed entry (`{info.filename}`, {info.file_size} bytes at {ratio:.0f}:1); "
                "torch never compresses, so it may be a zip bomb",
                hint=STORE_HINT,
            )
        if info.flag_bits & 0x1:
            raise EdgegenError(f"`{name}` is encrypted", hint=STORE_HINT)
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        twice = next(entry for entry in names if names.count(entry) > 1)
        raise UnsafeError(f"`{name}` has two entries called `{twice}`", hint=STORE_HINT)
    if sum(info.file_size for info in infos) > length:
        raise UnsafeError(f"`{name}` unpacks to more than its own size: it is a zip bomb", hint=STORE_HINT)
    placed = sorted(infos, key=lambda info: info.header_offset)
    for info, after in itertools.pairwise(placed):
        if info.header_offset + 30 + len(info.orig_filename) + info.file_size > after.header_offset:
            raise UnsafeError(
                f"entries `{info.filename}` and `{after.filename}` of `{name}` overlap: it is a zip bomb",
                hint=STORE_HINT,
            )
    roots = {entry.split("/", 1)[0] for entry in names}
    if len(roots) != 1 or not all("/" in entry for entry in names):
        return Archive(name, source, "", {entry: info.file_size for entry, info in zip(names, infos, strict=True)})
    root = roots.pop()
    sizes = {info.filename[len(root) + 1 :]: info.file_size for info in infos}
    return Archive(name, source, root, sizes)


def _refuse_torchscript(names: list[str], name: str) -> None:
    """Judged before compression is, because TorchScript does compress its code."""
    for entry in names:
        inner = entry.partition("/")[2]
        if inner == "constants.pkl" or inner.startswith("code/"):
            raise UnsafeError(
                f"`{name}` is a TorchScript archive: it carries code of its own, which loading would run",
                hint=EXPORT_HINT,
            )


def check_relative(entry: str, what: str) -> PurePosixPath:
    """`entry` as a path that stays where it is put; UnsafeError for an absolute path, a `..`, a drive or a NUL."""
    path = PurePosixPath(entry)
    odd = any(mark in entry for mark in ("\0", "\\"))
    if odd or not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise UnsafeError(
            f"{what} is named {entry!r}, which leads out of its folder",
            hint="name files relative to the folder that holds them, without `..`",
        )
    return path


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object; EdgegenError for anything else, NaN and infinities included."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise EdgegenError(f"`{name}` is not valid JSON: {error}", hint=DAMAGED_HINT) from error
    if not isinstance(value, dict):
        raise EdgegenError(f"`{name}` must hold a JSON object, not a {type(value).__name__}")
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file of at most 64 MiB."""
    return parse_json(read_small(path), path.name)


def read_small(path: Path) -> bytes:
    """The bytes of a regular file of at most 64 MiB; EdgegenError when it is missing, special, too large or
    unreadable.
    """
    if not path.is_file():
        raise EdgegenError(f"`{path}` is missing or not a regular file")
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise EdgegenError(f"`{path}` is larger than the {MAX_JSON_BYTES >> 20} MiB allowed for JSON")
        return path.read_bytes()
    except OSError as error:
        raise EdgegenError(f"`{path}` cannot be read: {error.strerror}") from error


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not say (Linux does)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def require_memory(needed: int, name: str) -> None:
    """EdgegenError when `needed` bytes of weights are more than this machine has free."""
    free = available_memory()
    if free is not None and needed > free:
        raise EdgegenError(
            f"`{name}` needs {_gib(needed)} GiB for its weights and this machine has {_gib(free)} GiB free",
            hint="close other programs, or build on a machine with more memory",
        )


def _gib(count: int) -> str:
    return f"{math.ceil(count / (1 << 30) * 100) / 100:.2f}"
