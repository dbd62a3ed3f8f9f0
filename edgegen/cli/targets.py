"""`edgegen targets`: what devices there are, everything that is known of one, and whether a file is a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgegen.cli.console import Output, clean, reporting
from edgegen.cli.group import SuggestingGroup
from edgegen.errors import UsageError

if TYPE_CHECKING:
    from edgegen.targets import Target


@click.group(cls=SuggestingGroup)
def command() -> None:
    """List, show and validate target devices."""


@command.command("list")
@reporting
def list_command(output: Output) -> None:
    """Name every target that ships, with its preferred backends."""
    from edgegen.targets import list_targets, load_target

    targets = [load_target(name) for name in list_targets()]
    data = [
        {
            "name": target.name,
            "title": target.title,
            "chipset": target.chipset.name,
            "os": target.device.os.name,
            "os_floor": target.os_floor,
            "app_memory_bytes": target.app_memory_bytes,
            "backends": list(target.backends),
        }
        for target in targets
    ]
    header = ("TARGET", "DEVICE", "SYSTEM", "APP MEMORY", "BACKENDS, BEST FIRST")
    rows = [
        (
            target.name,
            target.title,
            f"{target.device.os.name} {target.os_floor}+",
            _size(target.app_memory_bytes),
            ", ".join(target.backends),
        )
        for target in targets
    ]
    output.report(data, _columns([header, *rows]))


@command.command("show")
@click.argument("target", metavar="NAME|FILE")
@click.option("--toml", is_flag=True, help="Print the device's file as it is: a start for one of your own.")
@reporting
def show_command(target: str, toml: bool, output: Output) -> None:
    """Print everything that is known of a target, with the reason and reference of each denial."""
    from edgegen.targets import load_target
    from edgegen.targets.read import read_text, target_path

    found = load_target(target)
    if toml:
        click.echo(clean(read_text(target_path(target))), nl=False)
        return
    output.report(_as_data(found), lambda: clean(_as_text(found)))


@command.command("validate")
@click.argument("files", nargs=-1, metavar="FILE...")
@click.option("--emit-schema", is_flag=True, help="Print the JSON Schema of target files instead.")
@reporting
def validate_command(files: tuple[str, ...], emit_schema: bool, output: Output) -> None:
    """Check target files; every problem is a line `file:key: message`. Exit code 2 when there is one."""
    from edgegen.targets.read import TargetFileError, validate
    from edgegen.targets.schema import schema_text

    if emit_schema:
        if files:
            raise UsageError("`--emit-schema` takes no files", hint="edgegen targets validate --emit-schema")
        click.echo(schema_text(), nl=False)
        return
    if not files:
        raise UsageError("no file was named", hint="edgegen targets validate FILE...")
    problems: list[str] = []
    data = []
    for file in files:
        found: list[str] = []
        try:
            validate(Path(file))
        except TargetFileError as error:
            found = error.problems
        data.append({"file": file, "valid": not found, "problems": found})
        problems += found
    if output.json or problems:
        output.report(data, lambda: clean("\n".join(problems)))
    invalid = sum(not entry["valid"] for entry in data)
    if invalid:
        raise UsageError(
            f"{invalid} of {len(data)} target files {'is' if invalid == 1 else 'are'} not valid",
            hint="`edgegen targets show iphone15 --toml` prints one that is",
        )
    output.say(f"{len(data)} target file{'s are' if len(data) > 1 else ' is'} valid")


def _as_data(target: Target) -> dict[str, object]:
    return {
        "sha256": target.sha256,
        "device": target.device.model_dump(mode="json"),
        "chipset": target.chipset.model_dump(mode="json"),
        "delegates": {
            delegate.name: delegate.model_dump(mode="json") for group in target.delegates for delegate in group
        },
    }


def _as_text(target: Target) -> str:
    device = target.device
    lines = [
        f"{target.title} (`{target.name}`)",
        f"  chipset     {target.chipset.title}, {target.chipset.maker}",
        *(f"              {a.kind}: {a.title}; {', '.join(a.native)}" for a in target.chipset.accelerators),
        f"  memory      {_size(device.memory_bytes)}",
        f"  an app has  {_size(target.app_memory_bytes)}, {device.app_memory.known}: {device.app_memory.source}",
        f"  system      {device.os.name} {target.os_floor} and later",
    ]
    for rank, name in enumerate(target.backends, 1):
        backend = target.backend(name)
        lines += ["", f"{rank}. {name}: {', '.join(delegate.title for delegate in backend.delegates)}"]
        lines += [f"     {option} = {value}" for option, value in backend.options.items()]
        lines += [f"     builds {backend.default_precision} unless asked otherwise; executes:"]
        for precision in backend.precisions:
            stored = " (in the file only)" if precision in backend.stored_only else ""
            note = backend.notes.get(precision)
            lines.append(f"       {precision}{stored}" + (f": {note}" if note else ""))
        if backend.denied_ops:
            lines.append("     outside the delegate, or not as asked:")
        for denied in backend.denied_ops:
            when = f" ({denied.when})" if denied.when else ""
            lines += [f"       {denied.op}{when}: {denied.reason}", f"         [{denied.reference}]"]
    if device.denied_backends:
        lines += ["", "Not on this target:"]
    for refused in device.denied_backends:
        lines += [f"  {refused.backend}: {refused.reason}", f"    [{refused.reference}]"]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
