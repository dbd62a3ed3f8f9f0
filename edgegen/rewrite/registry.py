"""Every pass by name, and passes read back from the text that `str(pass)` gives."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import pkgutil
import re
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

import edgegen.rewrite
from edgegen.errors import UsageError
from edgegen.rewrite.base import Pass

_SPEC = re.compile(r"\s*([a-z0-9-]+)\s*(\{)?")


@cache
def all_passes() -> dict[str, type[Pass]]:
    """Name -> class of every pass under `edgegen.rewrite`, sorted by name."""
    found: dict[str, type[Pass]] = {}
    for info in pkgutil.walk_packages(edgegen.rewrite.__path__, "edgegen.rewrite."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if not (inspect.isclass(value) and issubclass(value, Pass) and value.__module__ == info.name):
                continue
            if "name" in vars(value):
                assert value.name not in found, f"two passes are called {value.name}"
                found[value.name] = value
    return dict(sorted(found.items()))


def get_pass(name: str) -> type[Pass]:
    """The class of the pass called `name`; UsageError with the nearest names."""
    passes = all_passes()
    if name not in passes:
        near = difflib.get_close_matches(name, passes, n=3)
        hint = "did you mean " + " or ".join(f"`{one}`" for one in near) if near else "edgegen passes list"
        raise UsageError(f"there is no pass `{name}`", hint=hint)
    return passes[name]


def parse(text: str) -> tuple[Pass, ...]:
    """`a, b{x=1, y="z"}` -> pass values; UsageError says where the text is wrong."""
    found: list[Pass] = []
    rest = text
    while rest.strip():
        head = _SPEC.match(rest)
        if head is None:
            raise UsageError(f"passes cannot be read at `{rest.strip()[:30]}`", hint="write `name, name{option=value}`")
        kind, rest = get_pass(head[1]), rest[head.end() :]
        options: dict[str, Any] = {}
        if head[2]:
            options, rest = _options(kind.name, rest)
        found.append(build(kind, options))
        rest = rest.lstrip()
        if rest and not rest.startswith(","):
            raise UsageError(f"passes cannot be read at `{rest[:30]}`", hint="put a comma between passes")
        rest = rest[1:]
    return tuple(found)


def build(kind: type[Pass], options: dict[str, Any]) -> Pass:
    """A pass value from JSON options; UsageError for an option that it has not, or a value of the wrong type."""
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {}
    for name, value in options.items():
        if name not in fields:
            known = ", ".join(f"`{one}`" for one in fields) or "none"
            raise UsageError(f"pass `{kind.name}` has no option `{name}`", hint=f"its options: {known}")
        try:
            # As JSON: lists are tuples there, and nothing else is converted ("4" is no number, 1 is not true).
            values[name] = TypeAdapter(hints[name]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise UsageError(f"option `{name}` of pass `{kind.name}`: {said}") from error
    missing = [name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING]
    if missing:
        raise UsageError(
            f"pass `{kind.name}` needs its option `{missing[0]}`", hint=f"write `{kind.name}{{{missing[0]}=...}}`"
        )
    return kind(**values)


def _options(name: str, text: str) -> tuple[dict[str, Any], str]:
    """`x=1, y=[2]}rest` -> options and the rest."""
    decoder, options = json.JSONDecoder(), {}
    text = text.lstrip()
    while not text.startswith("}"):
        head = re.match(r"([a-z_0-9]+)\s*=\s*", text)
        if head is None:
            raise UsageError(
                f"options of pass `{name}` cannot be read at `{text[:30]}`", hint="write `{option=value, ...}`"
            )
        if head[1] in options:
            raise UsageError(f"option `{head[1]}` of pass `{name}` is there twice")
        try:
            options[head[1]], end = decoder.raw_decode(text, head.end())
        except (ValueError, RecursionError) as error:  # too many digits, or brackets, are no JSONDecodeError
            said = getattr(error, "msg", str(error))
            raise UsageError(
                f"option `{head[1]}` of pass `{name}` is not JSON: {said}", hint='write text as "text"'
            ) from error
        text = text[end:].lstrip()
        if not text.startswith((",", "}")):
            raise UsageError(
                f"options of pass `{name}` cannot be read at `{text[:30]}`", hint="put a comma between options"
            )
        text = text.removeprefix(",").lstrip()
    return options, text[1:]
