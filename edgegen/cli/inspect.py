"""`edgegen inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgegen.cli.console import Output, clean, reporting

if TYPE_CHECKING:
    from edgegen.graph.tensor_spec import TensorSpec
    from edgegen.inspect import BackendFacts, Inspection

SHOWN_OPS = 12


@click.command("inspect")
@click.argument("path", metavar="MODEL|BUNDLE", type=click.Path(path_type=Path))
@click.option("--target", metavar="NAME", help="Also say which ops this device's runtimes would leave out.")
@reporting
def command(path: Path, target: str | None, output: Output) -> None:
    """Count parameters, MACs and ops of a model, or list what a bundle holds.

    Also shows the sampling schedule, and what each backend would refuse.
    """
    from edgegen.inspect import inspect_path

    found = inspect_path(path, target)
    output.report(found.model_dump(mode="json"), lambda: clean("\n".join(_text(found))))
    if not found.counted:
        output.say("a bundle holds no graphs, so nothing is counted; inspect the model for parameters, MACs and ops")


def _text(found: Inspection) -> list[str]:
    lines = [f"{found.kind} {found.name} ({found.task}) {found.sha256[:12]}"]
    if found.built_for is not None:
        lines.append(f"built for {found.built_for}")
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
                lines.append(f"  {one.backend} {one.precision}: {one.bytes:,} bytes, {ran}")
    if found.counted:
        parameters = sum(part.parameters or 0 for part in found.components.values())
        lines.append(f"together: {parameters:,} parameters")
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
