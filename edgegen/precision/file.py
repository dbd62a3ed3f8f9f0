"""Plans as files: TOML that a person reads and edits, or JSON by its suffix. What is read is never trusted."""

from __future__ import annotations

import json
import math
import os
import tempfile
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError
from tomlkit.items import Array, InlineTable, Table

from edgegen.errors import UsageError
from edgegen.files import read_text
from edgegen.precision.plan import OpPlan, PrecisionPlan, Range

SIZE_LIMIT = 16 * 2**20
"""Bytes; a thousand ops with the ranges of eight steps each take one."""
_DEEPEST = 16
"""Tables within tables; a plan has seven."""
_HEAD = """The precision of each quantizable op, by the module path that it comes from.
One line changed is a new plan: precision = "fp32", "fp16", "w8a8", "w8a8-dynamic", "w8", "w6" or "w4", where the target
executes it. input, output and other are the ranges that w8a8 quantizes activations for. weights and macs count the
op's; the decibels are the picture's against the float student when this op alone is changed, estimated."""

Notes = Mapping[tuple[str, str], str]
"""(component, op) -> what to say beside its precision."""


SHOWN = 20
"""Problems of a file that are said one by one."""


class PlanFileError(UsageError):
    """A plan file is not one, or not of this student and target; `problems` has a line for each thing that is wrong."""

    def __init__(self, problems: list[str], hint: str = "`edgegen plan --help` says how to make one") -> None:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        super().__init__("\n".join([*problems[:SHOWN], *more]), hint=hint)
        self.problems = problems


def plan_text(plan: PrecisionPlan, notes: Notes | None = None) -> str:
    """`plan` as TOML: keys in the order of the model, ops in that of the plan, one table an op."""
    document = tomlkit.document()
    for line in _HEAD.splitlines():
        document.add(tomlkit.comment(line))
    document.add(tomlkit.nl())
    data = _plain(plan)
    components = data.pop("components")
    front = data.pop("front", [])
    for key, value in data.items():
        if not isinstance(value, dict):
            document.add(key, value)
    if front:
        document.add("front", _rows(front))
    for key, value in data.items():  # what follows a table's head is the table's
        if isinstance(value, dict):
            document.add(key, _table(value))
    parts = tomlkit.table(is_super_table=True)
    for name, part in components.items():
        table = tomlkit.table()
        table.add("float_precision", part["float_precision"])
        ops = tomlkit.table(is_super_table=bool(part["ops"]))
        for key, op in part["ops"].items():
            ops.add(key, _op(op, (notes or {}).get((name, key))))
        table.add("ops", ops)
        parts.add(name, table)
    document.add("components", parts)
    return tomlkit.dumps(document)


def _plain(plan: PrecisionPlan) -> dict[str, Any]:
    """JSON values; what is None or as every op has it is left out."""
    data: dict[str, Any] = plan.model_dump(mode="json", exclude_none=True)
    for key in ("sampler", "predicted", "front", "budget", "repairs"):
        if not data[key]:
            del data[key]
    empty = {"form": "affine", "group": 0, "step_inputs": []}
    for part in data["components"].values():
        for op in part["ops"].values():
            for key, value in empty.items():
                if op[key] == value:
                    del op[key]
    return data


def _table(values: Mapping[str, Any]) -> Table:
    table = tomlkit.table()
    for key, value in values.items():
        table.add(key, value)
    return table


def _op(op: Mapping[str, Any], note: str | None) -> Table:
    table = tomlkit.table()
    for key, value in op.items():
        if isinstance(value, dict):
            value = _inline(value)
        elif key == "step_inputs":
            value = _rows(value)
        table.add(key, value)
        if key == "precision" and note:
            table[key].comment(" ".join(note.split()))
    return table


def _inline(value: Mapping[str, Any]) -> InlineTable:
    made = tomlkit.inline_table()
    made.update(value)
    return made


def _rows(values: Sequence[Mapping[str, Any]]) -> Array:
    rows = tomlkit.array()
    for one in values:
        rows.append(_inline(one))
    return rows.multiline(True)


def write_plan(path: Path, plan: PrecisionPlan, notes: Notes | None = None) -> None:
    """Write `plan` to `path`, whole or not at all: JSON where that ends in `.json`, else TOML with `notes`."""
    text = json.dumps(_plain(plan), indent=2) + "\n" if path.suffix == ".json" else plan_text(plan, notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_plan(path: Path) -> PrecisionPlan:
    """The plan in the file at `path`, whoever it is for. PlanFileError names the key of each thing that is wrong."""
    try:
        text = read_text(path, SIZE_LIMIT)
    except UsageError as error:
        raise PlanFileError([error.message]) from error
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanFileError([f"{path}: {error}"]) from error
    except (RecursionError, ValueError) as error:  # nesting without end; an integer of ten thousand digits
        raise PlanFileError([f"{path}: cannot be read ({type(error).__name__})"]) from error
    if isinstance(data, dict) and data.get("schema_version") == 1:
        raise PlanFileError(
            [f"{path}:schema_version: 1 is of an earlier edgegen, whose ranges are of another graph"],
            hint="make the plan again: `edgegen plan`",
        )
    odd = [f"{path}:{key}: {message}" for key, message in _odd("", data)]
    if odd:
        raise PlanFileError(odd)
    try:
        # Through JSON: strict, and still a list is a tuple and a key a number.
        return PrecisionPlan.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise PlanFileError([_problem(path, dict(problem)) for problem in error.errors()]) from error


def _odd(key: str, value: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
    """What TOML and Python's JSON can say and a plan cannot."""
    if depth > _DEEPEST:
        yield key, "is nested deeper than a plan"
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _odd(f"{key}.{name}".lstrip("."), one, depth + 1)
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _odd(f"{key}[{index}]", one, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, f"{value} is not a finite number"
    elif value is not None and not isinstance(value, str | int | float):
        yield key, f"a {type(value).__name__} has no place in a plan"


def _problem(path: Path, problem: dict[str, Any]) -> str:
    key = ""
    for part in problem["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = {"extra_forbidden": "unknown key", "missing": "is missing"}.get(problem["type"], message)
    return f"{path}:{key.lstrip('.') or '(file)'}: {message[:1].lower() + message[1:]}"


def nearest(name: str, known: Collection[str]) -> str:
    """`; nearest: ...` for an error about `name`, or nothing."""
    near = get_close_matches(name, known, n=2, cutoff=0.5)
    return f"; nearest: {', '.join(f'`{one}`' for one in near)}" if near else ""


def bad_ranges(op: OpPlan) -> list[str]:
    """Names of those of an op's ranges that are not finite."""
    named: dict[str, Range | None] = {"input": op.input, "other": op.other, "output": op.output}
    named |= {f"step_inputs[{index}]": one for index, one in enumerate(op.step_inputs)}
    return [name for name, one in named.items() if one and not (math.isfinite(one.low) and math.isfinite(one.high))]
