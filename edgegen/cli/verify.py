"""`edgegen verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from edgegen.cli.console import Output, clean, reporting


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", help="Only this one of the bundle's backends.")
@click.option("--require-full-delegation", is_flag=True, help="Exit 3 unless one delegate takes every op in one piece.")
@click.option("--blame", is_flag=True, help="Name the first op at which each component parts from its reference.")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="For --blame: the student that the bundle was built from. Without it, float16 is held against float32.",
)
@click.option(
    "--dump",
    type=click.Path(path_type=Path, file_okay=False),
    help="For --blame: write every value there, an .npy each, with index.json. A new folder.",
)
@click.option(
    "--accumulate",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="fp16: also measure what sums in float16 would lose (Core ML, by the reference evaluator).",
)
@reporting
def command(
    bundle: Path,
    backend: str | None,
    require_full_delegation: bool,
    blame: bool,
    model: Path | None,
    dump: Path | None,
    accumulate: Literal["fp32", "fp16"],
    output: Output,
) -> None:
    """Execute BUNDLE's artifacts on this machine and hold them against the reference that it carries.

    The same gates as in `edgegen build`; nothing is written into the bundle. Where Core ML is not, edgegen's reference
    evaluator executes Core ML packages, and the report says so. torch is needed for that and for --blame alone.
    """
    from edgegen.errors import UsageError
    from edgegen.report.summary import summarise, summary_table
    from edgegen.verify.bundle import raise_unless_met, verify_bundle

    if not blame and (model is not None or dump is not None):
        raise UsageError("`--model` and `--dump` are of `--blame`", hint="add `--blame`")
    student = None
    if blame:
        # Refused before any work: another student, and a folder that holds something.
        from edgegen.bundle.open import open_bundle
        from edgegen.verify.inside import load_model, look_inside, prepare_dump

        if dump is not None:
            prepare_dump(dump)
        if model is not None:
            student = load_model(model, open_bundle(bundle, check_hashes=False))
    with output.progress() as progress:
        progress.stage(f"verify {bundle}", 0)
        opened, reports = verify_bundle(
            bundle, backend, require_full_delegation=require_full_delegation, accumulate=accumulate
        )
        progress.advance()
        if blame:
            progress.stage("look inside", 0)
            reports = look_inside(opened, reports, student, dump, progress.note)
            progress.advance()
    said = {(one.backend, part.component): part.blame for one in reports for part in one.components if part.blame}
    lines = [f"{name}: {text}" for (name, _), text in said.items()]
    output.report(
        {
            "bundle": str(bundle),
            "backends": {report.backend: summarise(opened.manifest, report) for report in reports},
            **({"blame": _nested(said), "dump": None if dump is None else str(dump)} if blame else {}),
        },
        lambda: clean("\n".join([summary_table(opened.manifest, reports), *(lines if blame else [])])),
    )
    raise_unless_met(bundle, reports)


def _nested(said: dict[tuple[str, str], str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for (backend, component), text in said.items():
        found.setdefault(backend, {})[component] = text
    return found
