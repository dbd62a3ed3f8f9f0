"""Repeatable resource names in MLIR bytecode: the format's own rules, and nothing but names changed."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgegen.lower.mlir_bytecode import (
    BytecodeError,
    _emit,
    _parse,
    _read_strings,
    _read_varint,
    _Section,
    _write_strings,
    _write_varint,
    check_layout,
    rename_resources,
)

PREFIX = b"ML\xefR\x0dtest\0"


def code(strings, blob=b"weights"):
    return _emit(PREFIX, [_Section(1, None, b"ops"), _Section(5, 16, blob), _Section(0, None, _write_strings(strings))])


def strings_of(data):
    return _read_strings(bytes(next(s.data for s in _parse(data)[1] if s.number == 0)))


@given(st.integers(0, 2**64 - 1))
def test_numbers_survive(value):
    written = _write_varint(value)
    assert _read_varint(written, 0) == (value, len(written))
    assert len(written) <= 9


def test_numbers_are_written_as_the_format_says():
    assert [_write_varint(n) for n in (0, 1, 127, 128, 2**14)] == [
        b"\x01",
        b"\x03",
        b"\xff",
        b"\x02\x02",
        b"\x04\x00\x02",
    ]


@given(st.lists(st.binary(max_size=30).filter(lambda b: b"\0" not in b)))
def test_string_tables_survive(strings):
    assert _read_strings(_write_strings(strings)) == strings


def test_names_depend_on_content_and_order_only():
    first = rename_resources(code([b"main", b"resource_5", b"resource_17"]))
    second = rename_resources(code([b"main", b"resource_999999999999", b"resource_1"]))
    assert first == second
    assert rename_resources(first) == first
    main, one, two = strings_of(first)
    assert main == b"main" and one != two
    assert all(re.fullmatch(rb"resource_\d{19}", name) for name in (one, two))
    assert strings_of(rename_resources(code([b"main", b"resource_5", b"resource_17"], b"other"))) != strings_of(first)


def test_only_whole_names_are_renamed():
    kept = [b"resource_", b"resource_x1", b"my_resource_1", b"resource_1a"]
    assert strings_of(rename_resources(code(kept))) == kept


def test_sections_keep_their_alignment():
    sections = _parse(rename_resources(code([b"resource_1"], b"x" * 33)))[1]
    assert [(s.number, s.alignment, len(s.data)) for s in sections][:2] == [(1, None, 3), (5, 16, 33)]
    data = rename_resources(code([b"resource_1"], b"y" * 33))
    assert data.index(b"y" * 33) % 16 == 0


@given(st.binary(max_size=200))
def test_noise_is_refused_or_kept_whole(noise):
    try:
        rename_resources(noise)
    except BytecodeError:
        return
    assert noise.startswith(b"ML\xefR")


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_truncation_is_refused(cut):
    whole = code([b"main", b"resource_123"])
    check_layout(whole)
    with pytest.raises(BytecodeError):
        check_layout(whole[: min(cut, len(whole) - 1)])
