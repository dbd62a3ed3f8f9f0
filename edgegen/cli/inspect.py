"""`edgegen inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgegen.cli.console import Output, clean, reporting
from edgegen.cli.student_source import source_options

if TYPE_CHECKING:
    from edgegen.graph.tensor_spec import TensorSpec
    from edgegen.inspect import BackendFacts, Inspection
    from edgegen.lower.neural_engine import LintReport
    from edgegen.lower.package_facts import ArrayFacts, PackageFacts

SHOWN_OPS = 12


@click.command("inspect")
@click.argument("path", metavar="MODEL|BUNDLE|PACKAGE", type=click.Path(path_type=Path))
@click.option("--target", metavar="NAME", help="Also say which ops this device's runtimes would leave out.")
@source_options
@reporting
def command(path: Path, target: str | None, output: Output, **source: Any) -> None:
    """Count parameters, MACs and ops of a model, or list what a bundle or a Core ML package (`.mlpackage`) holds.

    Also shows the sampling schedule, what each backend would refuse, and what is known to leave the Neural Engine.
    """
    from edgegen.inspect import inspect_path
    from edgegen.lower.package_facts import PackageFacts
    from edgegen.students.source import Source

    found = inspect_path(path, target, Source.of(source))
    if isinstance(found, PackageFacts):
        output.report(found.model_dump(mode="json"), lambda: clean("\n".join(_package(found))))
        return
    output.report(found.model_dump(mode="json"), lambda: clean("\n".join(_text(found))))
    if not found.counted:
        output.say("a bundle holds no graphs, so nothing is counted; inspect the model for parameters, MACs and ops")


def _text(found: Inspection) -> list[str]:
    lines = [f"{found.kind} {found.name} ({found.task}) {found.sha256[:12]}"]
    if found.built_for is not None:
        lines.append(f"built for {found.built_for}")
    lines += [f"note: {note}" for note in found.notes]
    if found.levels:
        lines.append(f"holds {len(found.levels)} sizes: {', '.join(found.levels)}; this is `{found.levels[0]}`")
        lines.append(f"  another: `edgegen student level MODEL {found.levels[-1]} -o one.pt`, then inspect that")
    lines += [f"not to be had: {line}" for line in found.unavailable]
    lines.append("")
    for name, part in found.components.items():
        lines.append(f"{name}: {_signature(part.inputs)} -> {_signature(part.outputs)}")
        if part.parameters is not None and part.macs is not None and part.ops is not None:
            lines.append(f"  {part.parameters:,} parameters, {part.macs:,} MACs, {sum(part.ops.values())} ops")
            shown = list(part.ops.items())[:SHOWN_OPS]
            rest = len(part.ops) - len(shown)
            more = f", and {rest} other kinds" if rest > 0 else ""
            lines.append("  " + ", ".join(f"{op} {count}" for op, count in shown) + more)
            lines += [f"  not counted as MACs: {op} {count}" for op, count in part.uncounted.items()]
        for one in found.artifacts:
            if one.component == name:
                ran = "executed when built" if one.executed else "not executed when built"
                ran += f", by {one.executed_by}" if one.executed_by is not None else ""
                where = f"function `{one.function}` of {one.path} with " if one.function is not None else ""
                lines.append(f"  {one.backend} {one.precision}: {where}{one.bytes:,} bytes, {ran}")
                first = next(other for other in found.artifacts if other.path == one.path)
                if one.package is not None and one is first:  # it is about the package, whatever else is in that
                    lines += _lint(one.package.lint, "    ")
    if found.counted:
        parameters = sum(part.parameters or 0 for part in found.components.values())
        lines.append(f"together: {parameters:,} parameters")
    lines += [f"condition {name}: {value:g} unless said otherwise" for name, value in found.conditions.items()]
    for steps, table in found.sampler.items():
        default = " (default)" if steps == found.default_steps else ""
        lines += ["", f"sampler, {steps} {'step' if steps == 1 else 'steps'}{default}"]
        lines.append(f"  {'timestep':>10} {'input':>10} {'sample':>12} {'prediction':>12} {'noise':>10}")
        lines += [
            f"  {row.timestep:>10g} {row.input_scale:>10g} {row.sample:>12.6g} {row.prediction:>12.6g} {row.noise:>10g}"
            for row in table
        ]
    if found.backends:
        lines += ["", "backends" + (f" on {found.target}" if found.target is not None else "")]
        for backend in found.backends:
            lines += _backend(backend)
    lines += [f"  {name}: not in this bundle: {reason}" for name, reason in found.declined.items()]
    return lines


def _backend(facts: BackendFacts) -> list[str]:
    if facts.denied is not None:
        return [f"  {facts.backend}: refused: {facts.denied}"]
    head = f"  {facts.backend}: {', '.join(facts.precisions)}"
    if facts.missing:
        head += f"; not installed here: `{facts.install}`"
    lines = [head]
    for one in facts.refusals:
        when = f" (when: {one.when})" if one.when is not None else ""
        op = "any op" if one.op == "*" else f"{one.op} x{one.count}"
        lines.append(f"    {one.component}: {op}{when}: {one.reason}")
    return lines


def _signature(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in specs)


def _package(facts: PackageFacts) -> list[str]:
    sets = ", ".join(facts.operation_sets)
    lines = [f"Core ML package {facts.name}: specification {facts.specification_version} ({sets})"]
    for one in facts.functions:
        lines += ["", f"{one.name}: {_arrays(one.inputs)} -> {_arrays(one.outputs)}"]
        lines += [f"  keeps {_arrays((state,))} between calls" for state in one.states]
        shown = list(one.operations.items())[:SHOWN_OPS]
        rest = len(one.operations) - len(shown)
        more = f", and {rest} other kinds" if rest > 0 else ""
        lines.append(f"  {sum(one.operations.values())} operations: " + ", ".join(f"{k} {n}" for k, n in shown) + more)
        lines.append("  they give " + ", ".join(f"{dtype} {count}" for dtype, count in one.computes.items()))
    lines += ["", "weights"]
    lines += [
        f"  {one.kind}: {one.tensors} tensors, {one.elements:,} elements in {one.bytes:,} bytes"
        for one in facts.weights
    ]
    lines += [f"  {name}: {size:,} bytes" for name, size in facts.weight_files.items()]
    return [*lines, "", *_lint(facts.lint, "")]


def _lint(report: LintReport, indent: str) -> list[str]:
    if not report.findings:
        return [f"{indent}Neural Engine: nothing that is known to leave it or to be slow ({report.caveat})"]
    lines = [f"{indent}Neural Engine: {report.details()['neural_engine_lint']} ({report.caveat})"]
    said: set[str] = set()
    for one in report.findings:
        if one.reason in said:
            lines.append(f"{indent}    the same: {one.subject()}")
        else:
            lines.append(f"{indent}  {one.line()}")
            lines.append(f"{indent}    {one.advice} ({one.known}: {one.reference})")
        said.add(one.reason)
    return lines


def _arrays(values: tuple[ArrayFacts, ...]) -> str:
    shapes = [", ".join("?" if size is None else str(size) for size in one.shape) for one in values]
    return ", ".join(f"{one.name} {one.dtype}[{shape}]" for one, shape in zip(values, shapes, strict=True))
