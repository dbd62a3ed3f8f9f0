"""`edgegen doctor`: what is installed, which versions were tested together, what each missing part would enable."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgegen.cli.console import Output, clean, reporting
from edgegen.errors import EdgegenError

if TYPE_CHECKING:
    from edgegen.doctor import Package, Part, Report


@click.command()
@reporting
def command(output: Output) -> None:
    """Say what is installed, and what each missing part would enable.

    Exit code 0 also when extras are missing; 1 when the core itself cannot work.
    """
    from edgegen.doctor import examine

    report = examine()
    output.report({**asdict(report), "core_works": report.core_works}, lambda: clean(_as_text(report)))
    if not report.core_works:
        what = "a supported Python" if not report.python_supported else "all of its core dependencies"
        hint = "use Python 3.11, 3.12 or 3.13" if not report.python_supported else report.core.hint
        raise EdgegenError(f"edgegen cannot work here without {what}", hint=hint)


def _as_text(report: Report) -> str:
    supported = "" if report.python_supported else " (not supported)"
    lines = [f"edgegen {report.edgegen}, Python {report.python}{supported}, {report.platform}", ""]
    for part in (report.core, *report.extras):
        lines += _part_lines(part)
    if any(part.state == "differs" for part in (report.core, *report.extras)):
        lines += ["", "differs: within our range, and not the version of the tested set (constraints.txt)"]
    return "\n".join(lines)


def _part_lines(part: Part) -> list[str]:
    lines = [f"{part.name:<11} {part.state:<12} {part.enables}"]
    lines += [f"              {_package_text(package)}" for package in part.packages if package.state != "ok"]
    if part.hint:
        lines.append(f"              {part.hint}")
    return lines


def _package_text(package: Package) -> str:
    tested = f", tested with {package.tested}" if package.tested else ""
    if package.state == "missing":
        return f"{package.name} is missing: needs {package.required or 'any version'}{tested}"
    if package.state == "unsupported":
        return f"{package.name} {package.installed} is not supported: needs {package.required}{tested}"
    return f"{package.name} {package.installed} differs{tested}"
