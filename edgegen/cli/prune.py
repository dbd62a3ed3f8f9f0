"""`edgegen prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgegen.cli.amounts import milliseconds_or_share, share
from edgegen.cli.console import Output, clean, names_between_commas, reporting
from edgegen.cli.levels_table import levels_text
from edgegen.cli.student_source import source_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgegen.prune.command import Made
    from edgegen.prune.heal import Healed, HealOptions
    from edgegen.prune.nested import Nested
    from edgegen.prune.options import PruneOptions
    from edgegen.students.student import Student
    from edgegen.targets import Target

WIDTHS = ("max_macs", "ratio", "uniform", "separable")
"""Options that say how small, beside `--max-latency` and `--levels`."""
SHOWN = 3
"""Names of spaces that are listed for one reason."""


def _latency(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, Any]:
    """`120ms`; `0.6x` or `60%` of what it is."""
    if value is None:
        return {}
    number, milliseconds = milliseconds_or_share(value)
    return {"max_latency": number, "latency_ms": milliseconds}


def _separable(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, float]:
    """`40%` of the decoder, or `denoiser=60%,decoder=40%`."""
    return {name or "decoder": share for name, share in _macs(context, parameter, value).items()}


def _macs(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, float]:
    """`60%`, or `denoiser=60%,decoder=50%`."""
    found: dict[str, float] = {}
    for part in (value or "").split(",") if value is not None else ():
        wanted = "a share of the MACs as `60%`, or one a component as `denoiser=60%,decoder=50%`"
        name, equals, text = part.rpartition("=")
        asked = share(text, wanted)
        if (equals and not name.strip()) or asked > 1 or name.strip() in found:
            raise click.BadParameter(f"`{value}` is not {wanted}")
        found[name.strip()] = asked
    return found


def _levels(_: click.Context, __: click.Parameter, value: str | None) -> list[dict[str, float]] | None:
    """`75%,50%,30%`; a level may be `denoiser=60%:decoder=50%`."""
    return None if value is None else [_macs(_, __, level.replace(":", ",")) for level in value.split(",")]


def _level_name(shares: dict[str, float]) -> str:
    """`75` of 75 % of each, `denoiser60-decoder50` of those."""
    return "-".join(f"{name}{asked * 100:.6g}" for name, asked in shares.items())


@click.command("prune")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="Device whose kernels decide widths and latency.")
@click.option(
    "--backend",
    "backends",
    callback=names_between_commas,
    metavar="NAME[,NAME]|all",
    help="Default: what the target prefers.",
)
@click.option(
    "--component",
    "components",
    callback=names_between_commas,
    metavar="NAME[,NAME]",
    help="What is pruned. Default: denoiser,decoder.",
)
@click.option(
    "--max-latency", callback=_latency, metavar="MS|SHARE", help="`120ms` a picture, or `0.6x` of what it is."
)
@click.option(
    "--max-macs", callback=_macs, metavar="SHARE", help="`60%` of each component's, or `denoiser=60%,decoder=50%`."
)
@click.option(
    "--levels",
    callback=_levels,
    metavar="SHARE,SHARE[,...]",
    help="Several nested sizes in one checkpoint, the largest first: `75%,50%,30%` of each component's MACs; a level "
    "may be `denoiser=60%:decoder=50%`. `edgegen build` picks the one that fits.",
)
@click.option(
    "--level-names",
    callback=names_between_commas,
    metavar="NAME,NAME[,...]",
    help="Of --levels, in their order. Default: their shares, as `75`.",
)
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of every space that goes, as `0.4`.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What `edgegen tune` chose for MODEL, instead of a budget.",
)
@click.option(
    "--separable",
    callback=_separable,
    metavar="SHARE",
    help="Dense convolutions become depthwise and pointwise ones, until so much of the decoder's MACs is left, as "
    "`40%`; or `denoiser=60%,decoder=40%`. Before anything is cut. Fewer MACs, on CPUs not less time.",
)
@click.option(
    "--uniform", is_flag=True, help="One ratio for everything, units ranked by their weights: what others do."
)
@click.option("--depth/--no-depth", default=True, show_default=True, help="Whole blocks may be passed by.")
@click.option(
    "--steps", type=click.IntRange(min=1), help="Sampling steps of the pictures that importance is judged by."
)
@click.option("--samples", type=click.IntRange(min=2), default=8, show_default=True, help="How many pictures.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@click.option(
    "--heal",
    "heal_steps",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Distil what is left from MODEL, without data: so many steps of each network. Goes on after a kill.",
)
@click.option(
    "--heal-rate",
    type=click.FloatRange(0, 1, min_open=True),
    default=1e-3,
    show_default=True,
    help="Learning rate. What is cut to an eighth may want 4e-3.",
)
@click.option("--heal-batch", type=click.IntRange(min=1), default=32, show_default=True, help="Pictures a step.")
@click.option(
    "--min-psnr", type=click.FloatRange(0, 150), help="Healing ends when pictures come so near to MODEL's, in dB."
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 1),
    help="Healing ends when so few more prompts are drawn wrong, as `0.01`; of the `shapes` student alone.",
)
@click.option(
    "--output", "-o", "destination", type=click.Path(path_type=Path), default=Path("pruned.pt"), show_default=True
)
@source_options
@reporting
def command(
    model: Path,
    target: str,
    backends: tuple[str, ...] | None,
    components: tuple[str, ...] | None,
    max_latency: dict[str, Any],
    levels: list[dict[str, float]] | None,
    level_names: tuple[str, ...] | None,
    heal_steps: int | None,
    heal_rate: float,
    heal_batch: int,
    recipe: Path | None,
    min_psnr: float | None,
    max_drop: float | None,
    destination: Path,
    output: Output,
    lora: tuple[str, ...],
    arch: str | None,
    arch_config: Path | None,
    inputs: Path | None,
    timesteps: tuple[str, ...],
    guidance: float | None,
    **asked: Any,
) -> None:
    """Make MODEL smaller for a device: whole channels, heads, feed-forward units and blocks come out.

    What is left is a dense student like any other: `edgegen build`, `plan` and `student eval` take it. Importance is
    what a unit does to the final picture, on the student's own trajectory. With --heal, what is left then learns to
    answer as MODEL does, from noise and prompts alone.

    With --levels, OUTPUT holds several nested sizes of which every device takes the one that fits it, and --heal trains
    all of them together.
    """
    from dataclasses import replace

    from edgegen.build.recipe import chosen_backends
    from edgegen.cache import Cache
    from edgegen.errors import UsageError
    from edgegen.prune.command import prune
    from edgegen.prune.heal import HealOptions, heal, require_drawing
    from edgegen.prune.options import PruneOptions
    from edgegen.prune.recipe import read_recipe
    from edgegen.students.source import Source
    from edgegen.targets import load_target

    device = load_target(target)
    if recipe is not None and (levels is not None or components or max_latency or any(asked[one] for one in WIDTHS)):
        raise UsageError("`--recipe` says what comes out, and so does another option", hint="give `--recipe` alone")
    chosen = None if recipe is None else read_recipe(recipe)
    names = chosen_backends(device, backends or (chosen.backends if chosen is not None else None))
    student = Source(lora, arch, arch_config, inputs, timesteps, guidance).open(model)
    options = PruneOptions(components=components or (), **asked, **max_latency)
    if chosen is not None:
        options = replace(options, recipe=chosen)
    if heal_steps is None and (min_psnr is not None or max_drop is not None):
        raise UsageError("`--min-psnr` and `--max-drop` say when healing may end", hint="add `--heal 2000`")
    if heal_steps is not None:
        require_drawing(student)
    how = None
    if heal_steps is not None:
        how = HealOptions(heal_steps, heal_batch, heal_rate, max_drop=max_drop, min_psnr=min_psnr)
    if levels is not None:
        if any(asked[one] for one in WIDTHS if one != "separable") or max_latency:
            raise UsageError(
                "`--levels` says how small every level is, and so do `--max-macs`, `--max-latency` and `--ratio`",
                hint="give one of them",
            )
        if min_psnr is not None or max_drop is not None:
            raise UsageError(
                "`--min-psnr` and `--max-drop` end the healing of one size; levels take all their steps together",
                hint="leave them out, and see what every level came to in the table",
            )
        made_levels = _nested(student, device, names, options, levels, level_names, how, output)
        _write(made_levels.student, destination)
        data = {"path": str(destination), "sha256": made_levels.student.fingerprint, **made_levels.summary()}
        output.report(data, lambda: clean(f"{levels_text(made_levels)}\n\n{destination}"))
        return
    if level_names is not None:
        raise UsageError("`--level-names` names levels, and there are none", hint="add `--levels 75%,50%,30%`")
    healed = None
    with output.progress() as progress:
        made = prune(student, device, names, options, Cache(None), progress)
        smaller = made.student
        if how is not None:
            healed = heal(student, smaller, how, Cache(None), progress)
            smaller = healed.student
        _write(smaller, destination)
    data = {"path": str(destination), "sha256": smaller.fingerprint, **made.summary()}
    if healed is not None:
        data["healing"] = healed.summary()
    output.report(data, lambda: clean("\n".join([text(made), *_healing(healed), "", str(destination)])))


def _write(student: Student, destination: Path) -> None:
    from edgegen.students.checkpoint import save_pt

    destination.parent.mkdir(parents=True, exist_ok=True)
    save_pt(student, destination)


def _nested(
    student: Student,
    target: Target,
    backends: Sequence[str],
    options: PruneOptions,
    levels: Sequence[dict[str, float]],
    names: Sequence[str] | None,
    how: HealOptions | None,
    output: Output,
) -> Nested:
    from edgegen.cache import Cache
    from edgegen.errors import UsageError
    from edgegen.prune.nested import Asked, heal_nested, nested_levels

    if names is not None and len(names) != len(levels):
        raise UsageError(
            f"`--level-names` has {len(names)} names and `--levels` {len(levels)} levels", hint="give each level a name"
        )
    asked = [Asked(name, one) for name, one in zip(names or map(_level_name, levels), levels, strict=True)]
    with output.progress() as progress:
        made = nested_levels(student, target, backends, asked, options, Cache(None), progress)
        return made if how is None else heal_nested(student, made, how, Cache(None), progress)


def _healing(healed: Healed | None) -> list[str]:
    if healed is None:
        return []
    lines = ["", "  healing, on prompts that nothing was learned from"]
    lines += [
        f"    {one.component}, {one.phase}: {one.course.step} steps, {one.course.seconds:.0f} s"
        + (f"; {one.course.ended}" if one.course.ended else "")
        for one in healed.lessons
    ]
    whole = "" if healed.teacher_alignment is None else f" (unpruned: alignment {healed.teacher_alignment:.3f})"
    return [*lines, f"    before: {healed.before.said()}", f"    after:  {healed.after.said()}{whole}"]


def text(made: Made) -> str:
    """A table for people."""
    lines = [f"  {'':<14}{'parameters':>24}{'MACs':>32}{'units':>16}"]
    for one in made.parts:
        parameters = f"{one.before.parameters:,} -> {one.after.parameters:,}"
        macs = f"{one.before.macs / 1e6:,.1f} -> {one.after.macs / 1e6:,.1f} M"
        share = one.after.macs / max(1, one.before.macs)
        units = f"{one.units[0]} -> {one.units[1]}" if one.units[0] else "-"
        lines.append(f"  {one.name:<14}{parameters:>24}{macs:>24}{share:>8.3f}{units:>16}")
        lines += [f"    passed by: {path}" for path in one.removed]
        lines += [f"    separable, {rank} a channel: {path}" for path, rank in one.separated.items()]
    lines.append("")
    for name, (before, after) in made.latency.items():
        ratio = after / before if before else 1.0
        lines.append(
            f"  latency       {before:.3g} -> {after:.3g} ms ({ratio:.3f}) with {name} (estimated from "
            f"{made.latency_source})"
        )
    if made.psnr is not None:
        lines.append(f"  picture       {made.psnr:.1f} dB against the student that was pruned, without healing")
    if made.correlation is not None:
        lines.append(
            f"  importance    rank correlation {made.correlation[0]:.3f} of the estimate with {made.correlation[1]} "
            "units measured alone"
        )
    for name, reasons in made.frozen.items():
        lines += ["", f"  {name}: what may not be cut, and why"]
        for why, spaces in reasons.items():
            more = f" and {len(spaces) - SHOWN} more" if len(spaces) > SHOWN else ""
            lines.append(f"    {', '.join(spaces[:SHOWN])}{more}: {why}")
    return "\n".join(lines)
