"""MLIR bytecode with repeatable resource names, and what those resources hold.

The serializer behind Core AI names the blobs of an asset `resource_<random number>`, so one program gives other bytes,
and another file size, in every process. The names are keys that only need to differ from one another; here each becomes
a number derived from the rest of the file. Format: https://mlir.llvm.org/docs/BytecodeFormat/
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

_MAGIC = b"ML\xefR"
_STRINGS, _RESOURCES, _RESOURCE_SIZES = 0, 5, 6
_BLOB = 0
_ALIGNED = 0x80
_PADDING = b"\xcb"
_RESOURCE = re.compile(rb"resource_\d+")


class BytecodeError(ValueError):
    """Bytes that are not MLIR bytecode of the layout that is documented."""


@dataclass
class _Section:
    number: int
    alignment: int | None
    data: bytes | memoryview


def check_layout(code: bytes) -> None:
    """BytecodeError unless `code` is whole sections from first byte to last. What they hold is not looked at."""
    if not any(section.number == _STRINGS for section in _parse(code)[1]):
        raise BytecodeError("no string table")


def rename_resources(code: bytes) -> bytes:
    """`code` with a repeatable name for every `resource_<number>` of its string table. BytecodeError if malformed."""
    prefix, sections = _parse(code)
    digest = hashlib.sha256()
    for section in sections:
        if section.number != _STRINGS:
            digest.update(section.data)
    for section in sections:
        if section.number == _STRINGS:
            section.data = _write_strings(_renamed(_read_strings(bytes(section.data)), digest.digest()))
    return _emit(prefix, sections)


def resources(code: bytes) -> dict[str, bytes]:
    """The blobs of `code` by name: what its `dense_resource<name>` attributes hold. BytecodeError if malformed.

    One section says of each group (those outside of dialects are counted first) whose it is, then each resource's name,
    size and kind; the other holds them one after the other: of a blob its alignment, its size, padding, its bytes.
    """
    held: dict[int, bytes] = {}
    for section in _parse(code)[1]:
        held.setdefault(section.number, bytes(section.data))
    sizes, data = held.get(_RESOURCE_SIZES), held.get(_RESOURCES, b"")
    if sizes is None:
        return {}
    strings = _read_strings(held.get(_STRINGS, b""))
    found: dict[str, bytes] = {}
    _, at = _read_varint(sizes, 0)  # how many of the groups are outside of dialects: all are read alike
    start = 0
    while at < len(sizes):
        _, at = _read_varint(sizes, at)
        count, at = _read_varint(sizes, at)
        for _ in range(count):
            name, at = _read_varint(sizes, at)
            size, at = _read_varint(sizes, at)
            if at >= len(sizes) or name >= len(strings) or start + size > len(data):
                raise BytecodeError("resources run past the end")
            kind, at = sizes[at], at + 1
            if kind == _BLOB:
                found[strings[name].decode(errors="replace")] = _blob(data[start : start + size])
            start += size
    return found


def _blob(entry: bytes) -> bytes:
    _, at = _read_varint(entry, 0)
    size, at = _read_varint(entry, at)
    if at + size > len(entry):
        raise BytecodeError("a resource runs past its end")
    return entry[len(entry) - size :]


def _renamed(strings: list[bytes], seed: bytes) -> list[bytes]:
    renamed, taken = [], {text for text in strings if not _RESOURCE.fullmatch(text)}
    for index, text in enumerate(strings):
        if _RESOURCE.fullmatch(text):
            attempt = 0
            while True:
                hashed = hashlib.sha256(seed + index.to_bytes(8, "little") + attempt.to_bytes(8, "little")).digest()
                # Nineteen digits: one length for all, within 64 bits.
                text = b"resource_%d" % (10**18 + int.from_bytes(hashed[:16], "little") % (9 * 10**18))
                if text not in taken:
                    break
                attempt += 1
            taken.add(text)
        renamed.append(text)
    return renamed


def _parse(code: bytes) -> tuple[bytes, list[_Section]]:
    if not code.startswith(_MAGIC):
        raise BytecodeError("no MLIR magic number")
    _, at = _read_varint(code, len(_MAGIC))
    producer_end = code.find(b"\0", at)
    if producer_end < 0:
        raise BytecodeError("producer does not end")
    at = producer_end + 1
    prefix, sections, view = code[:at], [], memoryview(code)
    while at < len(code):
        number, at = code[at], at + 1
        length, at = _read_varint(code, at)
        alignment = None
        if number & _ALIGNED:
            alignment, at = _read_varint(code, at)
            if alignment == 0:
                raise BytecodeError("alignment of zero")
            at += -at % alignment
        if at + length > len(code):
            raise BytecodeError("section runs past the end")
        sections.append(_Section(number & ~_ALIGNED, alignment, view[at : at + length]))
        at += length
    return prefix, sections


def _emit(prefix: bytes, sections: list[_Section]) -> bytes:
    out = bytearray(prefix)
    for section in sections:
        out.append(section.number | (_ALIGNED if section.alignment is not None else 0))
        out += _write_varint(len(section.data))
        if section.alignment is not None:
            out += _write_varint(section.alignment)
            out += _PADDING * (-len(out) % section.alignment)
        out += section.data
    return bytes(out)


def _read_strings(data: bytes) -> list[bytes]:
    """Count, then lengths (with the closing zero) from the last string to the first, then the strings."""
    count, at = _read_varint(data, 0)
    lengths = []
    for _ in range(count):
        length, at = _read_varint(data, at)
        lengths.append(length)
    strings = []
    for length in reversed(lengths):
        if length == 0 or at + length > len(data) or data[at + length - 1] != 0:
            raise BytecodeError("string table is malformed")
        strings.append(data[at : at + length - 1])
        at += length
    if at != len(data):
        raise BytecodeError("string table has bytes left over")
    return strings


def _write_strings(strings: list[bytes]) -> bytes:
    out = bytearray(_write_varint(len(strings)))
    for text in reversed(strings):
        out += _write_varint(len(text) + 1)
    for text in strings:
        out += text + b"\0"
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Prefix varint: the trailing zero bits of the first byte say how many bytes follow."""
    if at >= len(data):
        raise BytecodeError("number runs past the end")
    first = data[at]
    size = 9 if first == 0 else (first & -first).bit_length()
    if at + size > len(data):
        raise BytecodeError("number runs past the end")
    if size == 9:
        return int.from_bytes(data[at + 1 : at + 9], "little"), at + 9
    return int.from_bytes(data[at : at + size], "little") >> size, at + size


def _write_varint(value: int) -> bytes:
    for size in range(1, 9):
        if value < 1 << (7 * size):
            return ((value << size) | (1 << (size - 1))).to_bytes(size, "little")
    return b"\0" + value.to_bytes(8, "little")
