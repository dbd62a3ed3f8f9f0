"""`edgegen passes`: what rewrites there are, all that one says of itself, and a run on one network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgegen.cli.console import Output, clean, reporting
from edgegen.cli.group import SuggestingGroup

if TYPE_CHECKING:
    from edgegen.passes import OptionFacts, PassFacts, PassRun


@click.group(cls=SuggestingGroup)
def command() -> None:
    """List, show and run the rewrites of graphs."""


@command.command("list")
@reporting
def list_command(output: Output) -> None:
    """Name every pass, its options with their defaults, and the error that it may make."""
    from edgegen.passes import list_passes

    passes = list_passes()
    output.report([one.model_dump(mode="json") for one in passes], lambda: clean("\n".join(_listed(passes))))


@command.command("show")
@click.argument("name")
@reporting
def show_command(name: str, output: Output) -> None:
    """Print all that a pass says of itself: the graph before and after, and when it declines."""
    from edgegen.passes import describe, docstring
    from edgegen.rewrite.registry import get_pass

    kind = get_pass(name)
    facts, text = describe(kind), docstring(kind)
    output.report({**facts.model_dump(mode="json"), "docstring": text}, lambda: clean(_shown(facts, text)))


@command.command("run")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--component", metavar="NAME", help="Which network of the model; a `.pt2` has one.")
@click.option("--passes", "specs", required=True, metavar="LIST", help="What to run, in order: `name, name{option=1}`.")
@click.option("--inputs", type=click.Path(path_type=Path, dir_okay=False), help="A safetensors file of its inputs.")
@click.option("--dump-ir", type=click.Path(path_type=Path, file_okay=False), help="Write the graph after each pass.")
@click.option("--time-passes", is_flag=True, help="Also print how long each pass took.")
@click.option("--verify", is_flag=True, help="Hold numbers after each pass against those before; exit 3 beyond them.")
@click.option(
    "--lower",
    metavar="BACKEND[:PRECISION]",
    help="Lower and execute the result too, and hold it against the graph; exit 3 below the gate of a build.",
)
@click.option(
    "--shrink",
    type=click.Path(path_type=Path, file_okay=False),
    help="When a pass fails, write the smallest graph that still fails there, and a command that shows it.",
)
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write the result, a .pt2."
)
@reporting
def run_command(
    model: Path,
    output: Output,
    component: str | None,
    specs: str,
    inputs: Path | None,
    dump_ir: Path | None,
    time_passes: bool,
    verify: bool,
    lower: str | None,
    shrink: Path | None,
    out: Path | None,
) -> None:
    """Run passes on one network of a model, and print what each changed and where it declined."""
    from edgegen.passes import PassRequest, run_passes

    request = PassRequest(
        model=model,
        component=component,
        passes=specs,
        inputs=inputs,
        dump_ir=dump_ir,
        verify=verify,
        shrink=shrink,
        output=out,
        lower=lower,
    )
    found = run_passes(request, output.say)
    output.report(found.model_dump(mode="json"), lambda: clean("\n".join(_ran(found, time_passes))))


def _listed(passes: tuple[PassFacts, ...]) -> list[str]:
    width = max(len(one.name) for one in passes)
    lines = []
    for one in passes:
        error = "same bits" if one.tolerance == 0 else f"within {one.tolerance:g}"
        lines.append(f"{one.name.ljust(width)}  {one.says} [{error}]")
        lines += [f"{'':{width}}  {_option(option)}" for option in one.options]
    return lines


def _option(option: OptionFacts) -> str:
    value = "" if option.required else f" = {json.dumps(option.default)}"
    return f"{{{option.name}: {option.type}{value}}}" + (f" {option.says}" if option.says else "")


def _shown(facts: PassFacts, text: str) -> str:
    lines = [facts.name, "", text, ""]
    lines += ["options", *(f"  {_option(option)}" for option in facts.options), ""] if facts.options else []
    lines.append("numbers stay the same bits" if facts.tolerance == 0 else f"numbers stay within {facts.tolerance:g}")
    if facts.changes_signature:
        lines.append("may change the inputs")
    if facts.after:
        lines.append(f"comes after {', '.join(facts.after)}, where those are run")
    if facts.needs:
        lines.append(f"needs {', '.join(facts.needs)} before it")
    return "\n".join(lines)


def _ran(found: PassRun, time_passes: bool) -> list[str]:
    header = ["PASS", "OPS", "CHANGED", "DECLINED"]
    header += ["SECONDS"] if time_passes else []
    header += ["ERROR"] if found.errors is not None else []
    rows: list[list[Any]] = [header]
    for one in found.passes:
        row = [one.spec, f"{one.ops_before} -> {one.ops_after}", "yes" if one.modified else "no", len(one.declined)]
        row += [f"{one.seconds:.3f}"] if time_passes else []
        name = one.spec.partition("{")[0]
        row += [f"{found.errors[name]:.2g}" if name in found.errors else "-"] if found.errors is not None else []
        rows.append(row)
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    for one in found.passes:
        for decline in one.declined:
            where = f" in {decline.module}" if decline.module else ""
            lines.append(
                f"{one.spec.partition('{')[0]} declined {decline.node} ({decline.op}){where}: {decline.reason}"
            )
    lines.append(
        f"{found.component} now takes " + ", ".join(f"{i.name} {i.dtype}{list(i.shape)}" for i in found.inputs)
    )
    if found.lowered_db is not None:
        from edgegen.verify.gates import decibels

        lines.append(f"lowered and executed: {decibels(found.lowered_db)}")
    if found.written is not None:
        lines.append(f"written to {found.written}")
    return lines
