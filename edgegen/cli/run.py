"""`edgegen run`."""

from __future__ import annotations

from pathlib import Path

import click

from edgegen.cli.console import Output, reporting


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What to draw.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which noise to start from.")
@click.option("--steps", type=int, help="Sampling steps. Default: what the bundle was built for.")
@click.option(
    "-o",
    "--output",
    "picture",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="The PNG to write.",
)
@click.option("--backend", metavar="NAME", help="Default: the first in the target's order whose runtime is here.")
@click.option("--skip-hashes", is_flag=True, help="Trust the bundle's files instead of hashing them all first.")
@reporting
def command(
    bundle: Path,
    prompt: str,
    seed: int,
    steps: int | None,
    picture: Path,
    backend: str | None,
    skip_hashes: bool,
    output: Output,
) -> None:
    """Draw a picture with BUNDLE on this machine, and print the path of the PNG.

    Core ML packages are executed by Core ML on macOS and by edgegen's reference evaluator elsewhere, which is said.
    """
    from edgegen.bundle.open import open_bundle
    from edgegen.bundle.picture import check_png_path, write_png
    from edgegen.bundle.run import generate

    check_png_path(picture)
    opened = open_bundle(bundle, check_hashes=not skip_hashes)
    drawn = generate(opened, prompt, seed, steps, backend)
    write_png(picture, drawn.image)
    warnings = list(drawn.warnings)
    if opened.extra_files:
        warnings.append(f"`{bundle}` holds files that are not the bundle's: {', '.join(opened.extra_files[:5])}")
    for warning in warnings:
        output.say(f"warning: {warning}")
    spent = sum(seconds for stage, seconds in drawn.timings.items() if not stage.startswith("load."))
    counted = f"{drawn.steps} step" if drawn.steps == 1 else f"{drawn.steps} steps"
    if drawn.executed_by is None:
        output.say(f"drawn by `{drawn.backend}` in {counted}, {spent * 1000:.0f} ms once loaded")
    else:
        output.say(f"drawn from `{drawn.backend}` artifacts in {counted}, executed by {drawn.executed_by}")
    report = {
        "picture": str(picture),
        "bundle": str(bundle),
        "backend": drawn.backend,
        "executed_by": drawn.executed_by,
        "prompt": prompt,
        "seed": drawn.seed,
        "steps": drawn.steps,
        "size": [drawn.image.shape[1], drawn.image.shape[0]],
        "seconds": drawn.timings,
        "warnings": warnings,
    }
    output.report(report, str(picture))
