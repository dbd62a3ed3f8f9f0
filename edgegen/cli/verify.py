"""`edgegen verify`."""

from __future__ import annotations

from pathlib import Path

import click

from edgegen.cli.console import Output, reporting


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", help="Only this one of the bundle's backends.")
@click.option("--require-full-delegation", is_flag=True, help="Exit 3 unless one delegate takes every op in one piece.")
@reporting
def command(bundle: Path, backend: str | None, require_full_delegation: bool, output: Output) -> None:
    """Execute BUNDLE's artifacts on this machine and hold them against the reference that it carries.

    The same gates as in `edgegen build`; nothing is written into the bundle. No torch is needed.
    """
    from edgegen.report.summary import summarise, summary_table
    from edgegen.verify.bundle import raise_unless_met, verify_bundle

    with output.progress() as progress:
        progress.stage(f"verify {bundle}", 0)
        manifest, reports = verify_bundle(bundle, backend, require_full_delegation=require_full_delegation)
        progress.advance()
    output.report(
        {"bundle": str(bundle), "backends": {report.backend: summarise(manifest, report) for report in reports}},
        lambda: summary_table(manifest, reports),
    )
    raise_unless_met(bundle, reports)
