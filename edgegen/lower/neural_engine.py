"""What in a saved Core ML program is known to leave the Neural Engine, to be slow on it or to break in its float16.

    report = lint(Path("denoiser.mlpackage"))
    report.notes()      # one line each, for people
    report.details()    # for a manifest

The list is data (`neural_engine.toml`): every entry has its reason, what to do and who says so. They are documented or
reported habits and no measurements; Core ML decides on the device, and only its compute plan there tells what it did.
"""

from __future__ import annotations

import math
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from edgegen.lower.mil_outline import MilFunction, MilOperation, Outline, Value

Severity = Literal["breaks", "leaves", "slows"]
"""In order of weight: numbers that go wrong, work that goes to another unit, work that takes longer than it must."""
SEVERITIES: tuple[Severity, ...] = ("breaks", "leaves", "slows")
Known = Literal["documented", "reported", "assumed"]
_Text = Annotated[str, Field(min_length=1)]

_CONTROL_FLOW = frozenset({"cond", "while_loop"})
_PRODUCTS = frozenset({"conv", "conv_transpose", "linear", "matmul", "einsum", "scaled_dot_product_attention"})
# What computes with the numbers that it gets; all others move or make them.
_INTEGER_ARITHMETIC = frozenset({"add", "sub", "mul", "floor_div", "mod", "maximum", "minimum", "matmul", "cumsum"})
_MASKED = frozenset({"add", "select", "maximum", "scaled_dot_product_attention"})
_HALF_MINIMUM = -65504.0
_OP = "op"
"""Rule of a finding that comes from `ops`."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Model):
    severity: Severity
    known: Known
    reason: _Text
    advice: _Text
    reference: _Text


class OpRule(_Model):
    """Operations that leave the Neural Engine whatever they are given."""

    types: tuple[_Text, ...]
    known: Known
    reason: _Text
    advice: _Text
    reference: _Text

    def rule(self) -> Rule:
        return Rule(severity="leaves", **self.model_dump(exclude={"types"}))


class Limits(_Model):
    """Numbers of the rules, as `neural_engine.toml` explains them."""

    rank: int
    align_bytes: int
    padding_bytes: int
    weight_file_bytes: int
    transposes_per_product: float
    mask: float
    mask_elements: int


class Habits(_Model):
    """The file `neural_engine.toml`."""

    title: _Text
    caveat: _Text
    limits: Limits
    rules: dict[str, Rule]
    ops: tuple[OpRule, ...]


class Place(_Model):
    """One operation. `module` is the path of the module that it came from, where the caller knows; `detail` a size."""

    function: str
    operation: str
    module: str | None = None
    detail: str = ""


class Finding(_Model):
    """One habit that a program meets, with every place; `op` is empty where it is about the package."""

    rule: str
    severity: Severity
    known: Known
    op: str
    reason: str
    advice: str
    reference: str
    places: tuple[Place, ...]

    def line(self, shown: int = 2) -> str:
        """One line for people."""
        names = [one.module or one.operation for one in self.places[:shown]]
        where = ", ".join(f"`{name}`" for name in dict.fromkeys(names) if name)
        rest = len(self.places) - len(names)
        more = f" and {rest} more" if rest > 0 else ""
        return f"{self.severity}: {self.subject()}: {self.reason}" + (f"; at {where}{more}" if where else "")

    def subject(self) -> str:
        """What it is about, how often, and the detail of the first place."""
        subject = f"{self.op} x{len(self.places)}" if self.op else self.rule
        return f"{subject} ({self.places[0].detail})" if self.places[0].detail else subject


class LintReport(_Model):
    """`operations` is how many were looked at; findings with the gravest first, those of
    one rule together."""

    package: str
    operations: int
    caveat: str
    findings: tuple[Finding, ...]

    def counts(self) -> dict[Severity, int]:
        """Places by severity."""
        return {one: sum(len(found.places) for found in self.findings if found.severity == one) for one in SEVERITIES}

    def details(self) -> dict[str, str]:
        """For `Lowered.details`, and so for the manifest."""
        said = ", ".join(f"{count} {severity}" for severity, count in self.counts().items() if count)
        return {"neural_engine_lint": said or "nothing found"}

    def notes(self) -> tuple[str, ...]:
        """For `Lowered.notes`: a line for each finding that breaks numbers or leaves the Neural Engine."""
        return tuple(f"Neural Engine, {one.line()}" for one in self.findings if one.severity != "slows")


def habits() -> Habits:
    """The list that ships."""
    return Habits.model_validate(tomllib.loads(Path(__file__).with_name("neural_engine.toml").read_text()))


def lint(package: Path, modules: Mapping[str, str] | None = None) -> LintReport:
    """Read a saved `.mlpackage` folder, or one function of it (`mlpackage.function_path`), and hold it against what
    is known of the Neural Engine.

    `modules` gives the path of the source module by name of operation. Executes nothing and reads no weights but masks.
    EdgegenError for what is no ML Program, or leaves its own folder.
    """
    from edgegen.lower.mil_outline import read_outline

    return lint_outline(read_outline(package), modules)


def lint_outline(outline: Outline, modules: Mapping[str, str] | None = None) -> LintReport:
    """`lint` for a package that was opened."""
    known = habits()
    leaving = {type: one.rule() for one in known.ops for type in one.types}
    found: dict[tuple[str, str], list[Place]] = defaultdict(list)
    operations = [one for function in outline.functions for one in function.operations if one.at_run_time]
    for one in operations:
        module = (modules or {}).get(one.name)
        met = [(rule, detail) for rule, check in _CHECKS.items() for detail in check(one, outline, known.limits)]
        if one.type in leaving:
            met.append((_OP, ""))
        for rule, detail in met:
            place = Place(function=one.function, operation=one.name, module=module, detail=detail)
            found[(rule, one.type)].append(place)
    for function in outline.functions:
        for rule, op, place in (*_shapes(function), *_transposes(function, known.limits, modules or {})):
            found[(rule, op)].append(place)
    for name, size in outline.weight_files().items():
        if size > known.limits.weight_file_bytes:
            found[("weight-file", "")].append(Place(function="", operation=name, detail=f"{size / 1e9:.2f} GB"))
    findings = []
    for (rule, op), places in found.items():
        said = leaving[op] if rule == _OP else known.rules[rule]
        findings.append(Finding(rule=rule, op=op, places=tuple(places), **said.model_dump()))
    findings.sort(key=lambda one: (SEVERITIES.index(one.severity), one.rule, one.reason, -len(one.places), one.op))
    return LintReport(
        package=outline.path.name, operations=len(operations), caveat=known.caveat, findings=tuple(findings)
    )


# One check a rule: the details of what an operation does wrong, nothing for an operation that is well.


def _rank(operation: MilOperation, _: Outline, limits: Limits) -> Iterator[str]:
    for value in (*operation.outputs, *(one for values in operation.inputs.values() for one in values)):
        if value.type is not None and len(value.type.shape) > limits.rank:
            yield f"rank {len(value.type.shape)}"
            return


def _alignment(operation: MilOperation, _: Outline, limits: Limits) -> Iterator[str]:
    for value in operation.outputs:
        count = value.elements
        if value.type is None or not value.type.shape or not count or not value.type.element.floating:
            continue
        last = value.type.shape[-1]
        assert last is not None
        row = last * value.type.element.bits // 8
        padded = math.ceil(row / limits.align_bytes) * limits.align_bytes
        if (padded - row) * (count // last) > limits.padding_bytes:
            yield f"{value.type}: rows of {row} bytes take {padded}"
            return


def _dtype(operation: MilOperation, _: Outline, limits: Limits) -> Iterator[str]:
    wide = next((one for one in operation.outputs if one.type is not None and one.type.element.name == "fp32"), None)
    if wide is not None and operation.type not in ("cast", "identity", "const"):
        yield str(wide.type)


def _integers(operation: MilOperation, _: Outline, limits: Limits) -> Iterator[str]:
    if operation.type in _INTEGER_ARITHMETIC and any(
        one.type is not None and one.type.element.name == "int32" for one in operation.outputs
    ):
        yield ""


def _dilation(operation: MilOperation, outline: Outline, limits: Limits) -> Iterator[str]:
    if operation.type in ("conv", "conv_transpose"):
        for value in operation.inputs.get("dilations", ()):
            numbers = outline.array(value) if value.message is not None else None
            if numbers is not None and numbers.size and numbers.max() > 1:
                yield f"dilations {numbers.tolist()}"


def _control_flow(operation: MilOperation, _: Outline, limits: Limits) -> Iterator[str]:
    if operation.type in _CONTROL_FLOW:
        yield ""


def _mask(operation: MilOperation, outline: Outline, limits: Limits) -> Iterator[str]:
    if operation.type not in _MASKED:
        return
    half = any(one.type is not None and one.type.element.name == "fp16" for one in operation.outputs)
    for value in (one for values in operation.inputs.values() for one in values):
        if value.message is None or value.type is None or not value.type.element.floating:
            continue
        if 0 < value.elements <= limits.mask_elements:
            numbers = outline.array(value)
            low = float(np.min(numbers)) if numbers is not None else 0.0
            if low == -math.inf or (half and low <= _HALF_MINIMUM):
                yield f"{value.type} down to {low:g}, below {limits.mask:g}"
                return


def _linear(operation: MilOperation, _: Outline, limits: Limits) -> Iterator[str]:
    values = operation.inputs.get("weight" if operation.type == "linear" else "y", ())
    if operation.type in ("linear", "matmul") and any(one.constant for one in values):
        yield str(operation.outputs[0].type)


def _int8(operation: MilOperation, _: Outline, limits: Limits) -> Iterator[str]:
    if operation.type == "quantize":
        yield ""


_CHECKS: dict[str, Callable[[MilOperation, Outline, Limits], Iterator[str]]] = {
    "rank": _rank,
    "alignment": _alignment,
    "dtype": _dtype,
    "integers": _integers,
    "dilation": _dilation,
    "control-flow": _control_flow,
    "mask": _mask,
    "linear": _linear,
    "int8-activations": _int8,
}


def _shapes(function: MilFunction) -> Iterator[tuple[str, str, Place]]:
    """Values whose shape is open: the inputs, and where no input is, the operation that makes the first."""
    open_inputs = [one for one in function.inputs if _is_open(one)]
    for value in open_inputs:
        yield "dynamic-shape", "", Place(function=function.name, operation=value.name, detail=str(value.type))
    if not open_inputs:
        for one in function.operations:
            if one.at_run_time and any(map(_is_open, one.outputs)):
                detail = str(one.outputs[0].type)
                yield "dynamic-shape", one.type, Place(function=function.name, operation=one.name, detail=detail)
                return


def _is_open(value: Value) -> bool:
    return value.type is not None and None in value.type.shape


def _transposes(function: MilFunction, limits: Limits, modules: Mapping[str, str]) -> Iterator[tuple[str, str, Place]]:
    transposes = [one for one in function.operations if one.type == "transpose"]
    products = sum(one.type in _PRODUCTS for one in function.operations)
    if len(transposes) > limits.transposes_per_product * max(1, products):
        detail = f"{len(transposes)} for {products} products"
        for one in transposes:
            place = Place(function=function.name, operation=one.name, module=modules.get(one.name), detail=detail)
            yield "transposes", "transpose", place
