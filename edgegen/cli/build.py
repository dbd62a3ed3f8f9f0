"""`edgegen build`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgegen.cli.amounts import byte_count, milliseconds_or_share
from edgegen.cli.console import Output, names_between_commas, reporting
from edgegen.cli.student_source import source_options

if TYPE_CHECKING:
    from edgegen.build.pipeline import Built
    from edgegen.build.recipe import Recipe
    from edgegen.lower.backend import Precision


def _latency(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, bool] | None:
    """`120ms`; `0.6x` or `60%` of the largest level's."""
    return None if value is None else milliseconds_or_share(value)


@click.command("build")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--target",
    "targets",
    required=True,
    callback=names_between_commas,
    metavar="NAME[,NAME]",
    help="Device to build for.",
)
@click.option(
    "--output",
    "-o",
    "destination",
    type=click.Path(path_type=Path),
    help="Bundle folder; its parent for several targets.",
)
@click.option(
    "--backend",
    "backends",
    callback=names_between_commas,
    metavar="NAME[,NAME]|all",
    help="Default: what the target prefers.",
)
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), help="Default: the target's, per backend.")
@click.option(
    "--plan",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Compress as this file of `edgegen plan` says; builds its backends.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps that `run` takes by default.")
@click.option("--require-full-delegation", is_flag=True, help="Exit 3 unless one delegate takes every op in one piece.")
@click.option(
    "--max-pieces",
    type=click.IntRange(min=1),
    help="Exit 3, before lowering, if a delegate would cut a component into more pieces.",
)
@click.option(
    "--max-memory",
    callback=byte_count,
    metavar="BYTES",
    help="What the app may use on the device, as `300MB`: what does not fit is loaded in turn, cut into parts or drawn "
    "in tiles. Default: the target's.",
)
@click.option(
    "--max-latency",
    callback=_latency,
    metavar="MS|SHARE",
    help="Of a picture, estimated: `120ms`, or `0.6x` of the largest level. Of a checkpoint with several sizes the "
    "largest that keeps to it is built; exit 3 where none does.",
)
@click.option(
    "--level",
    metavar="NAME",
    help="Of a checkpoint with several sizes. Default: for each target the largest that fits.",
)
@click.option(
    "--one-package/--package-each",
    default=None,
    help="Core ML, iOS 18 and later: one package with functions `encode`, `denoise` and `decode`, or a package for "
    "each component. Default: the target's.",
)
@click.option(
    "--passes",
    metavar="LIST",
    help="Changes to the rewrites: `-name` leaves one out, `name{option=value}` adds or replaces one, `none` clears.",
)
@click.option(
    "--dump-ir", type=click.Path(path_type=Path, file_okay=False), help="Write each graph after every pass there."
)
@click.option(
    "--shrink",
    type=click.Path(path_type=Path, file_okay=False),
    help="When a backend gets a component wrong, write the smallest graph that shows it there. Takes long.",
)
@click.option("--time-passes", is_flag=True, help="Print how long each rewrite took.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and stop.")
@click.option("--smoke", is_flag=True, help="First run all of it on a two-layer copy of the student.")
@source_options
@reporting
def command(
    model: Path,
    targets: tuple[str, ...],
    destination: Path | None,
    output: Output,
    backends: tuple[str, ...] | None,
    precision: Precision | None,
    plan: Path | None,
    steps: int | None,
    require_full_delegation: bool,
    max_pieces: int | None,
    max_memory: int | None,
    max_latency: tuple[float, bool] | None,
    level: str | None,
    one_package: bool | None,
    passes: str | None,
    dump_ir: Path | None,
    shrink: Path | None,
    time_passes: bool,
    dry_run: bool,
    smoke: bool,
    **source: Any,
) -> None:
    """Compile MODEL for a device: lower, execute, compare, measure, bundle.

    MODEL is an edgegen .pt, a .safetensors with its config, a diffusers folder or a checked .pt2. The bundle appears
    only when every gate is met; otherwise what was made goes to OUTPUT.failed.
    """
    from edgegen.build.command import BuildRequest, prepare, run
    from edgegen.build.levels import LatencyBudget
    from edgegen.students.source import Source, unavailable

    request = BuildRequest(
        model=model,
        targets=targets,
        output=destination,
        backends=backends,
        precision=precision,
        steps=steps,
        require_full_delegation=require_full_delegation,
        max_pieces=max_pieces,
        max_memory=max_memory,
        max_latency=None if max_latency is None else LatencyBudget(*max_latency),
        level=level,
        one_package=one_package,
        passes=passes,
        plan=plan,
        dump_ir=dump_ir,
        shrink=shrink,
        source=Source.of(source),
    )
    with output.progress() as progress:
        prepared = prepare(request, progress)
    for line in unavailable(prepared.student):
        output.say(f"not to be had: {line}")
    if dry_run:
        recipes = [recipe.model_dump(mode="json") for recipe in prepared.recipes]
        output.report({"recipes": recipes}, lambda: "\n\n".join(_recipe_text(recipe) for recipe in prepared.recipes))
        return
    with output.progress() as progress:
        built = run(prepared, progress, smoke=smoke)
    output.report(
        {"bundles": [one.summary(time_passes=time_passes) for one in built]},
        lambda: "\n\n".join(_text(one, time_passes) for one in built),
    )


def _recipe_text(recipe: Recipe) -> str:
    from edgegen.report.levels import level_lines

    lines = [f"{recipe.student} for {recipe.target} -> {recipe.output}"]
    for backend in recipe.backends:
        options = " ".join(f"{key}={value}" for key, value in backend.options.items())
        lines.append(f"  build    {backend.name} {backend.precision} {options}".rstrip())
        lines.append(f"           {', '.join(backend.passes) or 'no passes of its own'}")
        if backend.functions:
            named = ", ".join(f"`{function}` ({component})" for component, function in backend.functions.items())
            lines.append(f"  join     {backend.name}: one package with {named}")
    lines += [f"  decline  {name}: {reason}" for name, reason in recipe.declined.items()]
    lines += [f"  passes   {name}: {', '.join(passes) or 'none'}" for name, passes in recipe.canonical.items()]
    if recipe.level is not None:
        lines += [f"  level    {line}" for line in level_lines(recipe.level)]
    lines.append(f"  memory   {_size(recipe.memory.bytes)} at most ({recipe.memory.source})")
    if recipe.steps is not None:
        lines.append(f"  steps    {recipe.steps}")
    gates = recipe.gates
    if recipe.plan is not None:
        for name, part in recipe.plan.components.items():
            counts = Counter(op.precision for op in part.ops.values())
            said = ", ".join(f"{count} {precision}" for precision, count in sorted(counts.items()))
            lines.append(f"  plan     {name}: {said or 'nothing compressed'}, the rest {part.float_precision}")
    used = sorted({backend.precision for backend in recipe.backends})
    lines += [
        f"  gates    {p}: SQNR >= {gates.sqnr_db[p]:g} dB, picture >= {gates.picture_psnr_db[p]:g} dB" for p in used
    ]
    lines.append(f"  gates    conditioning sensitivity within {gates.sensitivity_tolerance:.0%}")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**10:.0f} KiB"


def _text(built: Built, time_passes: bool) -> str:
    from edgegen.report.levels import level_lines
    from edgegen.report.rewrites import timing_table
    from edgegen.report.summary import summary_table

    times = f"\n\n{timing_table(built.rewrites)}\n" if time_passes else ""
    level = built.manifest.level
    sizes = "" if level is None else "\n" + "\n".join(level_lines(level))
    return f"{summary_table(built.manifest, built.reports)}{sizes}{times}\n{built.path}"
