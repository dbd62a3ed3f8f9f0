"""`edgegen plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgegen.cli.amounts import BYTE_UNITS, amount
from edgegen.cli.console import Output, clean, names_between_commas, reporting
from edgegen.cli.student_source import source_options

if TYPE_CHECKING:
    from edgegen.precision.options import Planned

SHOWN_POINTS = 6


def _latency(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, Any]:
    """`0.45`, `45%` or `0.45x` of fp32's; `20ms`."""
    if value is None:
        return {}
    wanted = "a share of fp32's latency as `0.45` or `45%`, or milliseconds as `20ms`"
    number, unit = amount(value, wanted)
    if unit == "ms":
        return {"max_latency_ms": number}
    if unit not in ("", "x", "%"):
        raise click.BadParameter(f"`{value}` is not {wanted}")
    return {"max_latency": number / 100 if unit == "%" else number}


def _size(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, Any]:
    """`30%` or `0.3x` of fp32's; `3.2MB`."""
    if value is None:
        return {}
    wanted = "bytes as `3200000` or `3.2MB`, or a share of fp32's as `30%`"
    number, unit = amount(value, wanted)
    if unit in ("x", "%"):
        return {"max_size_ratio": number / 100 if unit == "%" else number}
    if unit not in BYTE_UNITS:
        raise click.BadParameter(f"`{value}` is not {wanted}")
    return {"max_size": int(number * BYTE_UNITS[unit])}


@click.command("plan")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="Device to plan for.")
@click.option(
    "--backend",
    "backends",
    callback=names_between_commas,
    metavar="NAME[,NAME]|all",
    help="Default: what the target prefers.",
)
@click.option(
    "--output", "-o", "destination", type=click.Path(path_type=Path, dir_okay=False), help="Plan file: .toml or .json."
)
@click.option(
    "--precision-set",
    "precisions",
    callback=names_between_commas,
    metavar="LIST",
    help="What may be used beside the float: `w8a8,w8`. Default: all that the target executes.",
)
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), help="Of what stays float. Default: the target's.")
@click.option("--level", metavar="NAME", help="Of a checkpoint that holds several sizes: the one to plan for.")
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps whose picture is judged.")
@click.option(
    "--max-latency", callback=_latency, metavar="SHARE|MS", help="`0.45` of fp32's, or `20ms`; both are estimates."
)
@click.option("--max-size", callback=_size, metavar="BYTES|SHARE", help="Of all weights: `3.2MB`, or `30%` of fp32's.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What `edgegen tune` chose: the plan may cost what the recipe's precisions cost, and loses least for that.",
)
@click.option("--min-psnr", type=click.FloatRange(0, 150), help="dB of the picture against the float student's.")
@click.option(
    "--max-conditioning", type=click.FloatRange(0, 1), help="By what share a prompt may move the picture more or less."
)
@click.option(
    "--min-alignment", type=click.FloatRange(0, 1), help="Share of prompts drawn right; of the `shapes` student alone."
)
@click.option(
    "--minimise", "aim", type=click.Choice(["latency", "size", "loss"]), help="Default: latency, or loss under a cap."
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), metavar="FILE", help="Prompts, one a line. Default: what ships."
)
@click.option(
    "--repairs/--no-repairs", default=True, show_default=True, help="Mend weights, biases and the sampler's schedule."
)
@click.option(
    "--qat",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Train the quantized weights, without data, to answer as the float student does: at most so many steps.",
)
@source_options
@reporting
def command(
    model: Path,
    target: str,
    backends: tuple[str, ...] | None,
    destination: Path | None,
    max_latency: dict[str, Any],
    max_size: dict[str, Any],
    level: str | None,
    recipe: Path | None,
    output: Output,
    lora: tuple[str, ...],
    arch: str | None,
    arch_config: Path | None,
    inputs: Path | None,
    timesteps: tuple[str, ...],
    guidance: float | None,
    **asked: Any,
) -> None:
    """Choose the precision of every op of MODEL for a device, within a budget of time, bytes and quality.

    The plan is a text file: change a line, and `edgegen build --plan FILE` builds what it then says. Latencies are
    estimates from the target's tables; the picture's decibels are measured in torch. What repairs change in the
    weights lies beside the plan, in a file of the same name that ends in `.safetensors`: the two belong together.
    """
    from edgegen.build.recipe import chosen_backends
    from edgegen.cache import Cache
    from edgegen.errors import UsageError
    from edgegen.precision.options import PlanOptions
    from edgegen.precision.planner import make_plan, write_planned
    from edgegen.prune.elastic import chosen_level
    from edgegen.prune.recipe import read_recipe, require_left_by
    from edgegen.students.source import Source
    from edgegen.targets import load_target

    device = load_target(target)
    chosen = None if recipe is None else read_recipe(recipe)
    names = chosen_backends(device, backends or (chosen.backends if chosen is not None else None))
    student = chosen_level(Source(lora, arch, arch_config, inputs, timesteps, guidance).open(model), level)
    options = PlanOptions(**asked, **max_latency, **max_size)
    if chosen is not None:
        if max_latency or max_size or options.precisions is not None:
            raise UsageError(
                "`--recipe` says what a plan may cost, and so does another option", hint="give one of them"
            )
        if not any(chosen.precisions.values()):
            raise UsageError(f"recipe `{recipe}` has no precisions: it is of widths alone", hint="leave `--recipe` out")
        chosen.require_for(device.name, names)
        require_left_by(chosen, student)
        options = options.model_copy(update={"like": chosen.precisions})
    path = destination or Path(f"{student.config.name}-{device.name}.plan.toml")
    with output.progress() as progress:
        planned = make_plan(student, device, names, options, Cache(None), progress)
        write_planned(path, planned)
    output.report({"path": str(path), **planned.summary()}, lambda: clean(_text(planned, path)))


def _text(planned: Planned, path: Path) -> str:
    from edgegen.precision.options import DEFAULT_CONDITIONING

    plan = planned.plan
    used = sorted({precision for counts in planned.counts().values() for precision in counts})
    lines = [f"{plan.student} for {plan.target} with {', '.join(plan.backends)}", ""]
    lines.append(f"  {'ops in':<16}" + "".join(f"{name:>14}" for name in used))
    for name, counts in planned.counts().items():
        lines.append(f"  {name:<16}" + "".join(f"{counts.get(one, 0):>14}" for one in used))
    lines.append("")
    said = plan.predicted
    sure = f", >= {said['picture_psnr_db_sure']:.1f} of other prompts" if "picture_psnr_db_sure" in said else ""
    lines.append(
        f"  picture     {said['picture_psnr_db']:.1f} dB measured in torch{sure}, "
        f"{said['picture_psnr_db_estimated']:.1f} estimated"
    )
    if "picture_psnr_db_unrepaired" in said:
        lines.append(f"              {said['picture_psnr_db_unrepaired']:.1f} dB before the repairs")
    if "picture_psnr_db_untrained" in said:
        lines.append(f"              {said['picture_psnr_db_untrained']:.1f} dB before the training")
    lines.append(f"  prompts     move the picture by {said['conditioning_change']:.1%} more or less than in float")
    if "conditioning_change_sure" in said:
        lines.append(
            f"              at the worst step of {said['conditioning_pairs']:.0f} pairs of them; other prompts "
            f"stay within {said['conditioning_change_sure']:.1%}"
        )
        asked = plan.budget.get("max_conditioning", DEFAULT_CONDITIONING)
        if said["conditioning_change_sure"] > asked:
            lines.append(f"              a build asks for {asked:.0%}, which this plan may miss: its costs came first")
    if "alignment" in said:
        lines.append(f"  alignment   {said['alignment']:.1%}")
    lines.append(f"  bytes       {said['bytes']:,.0f}, {said['bytes_ratio']:.3f} of fp32")
    for name in plan.backends:
        milliseconds = said.get(f"latency_ms_estimated.{name}")
        more = "" if milliseconds is None else f", {milliseconds:.3g} ms"
        lines.append(
            f"  latency     {said[f'latency_ratio_estimated.{name}']:.3f} of fp32{more} with {name} (estimated)"
        )
    if planned.rank_correlation is not None:
        lines.append(
            f"  sensitivity rank correlation {planned.rank_correlation:.3f} of the estimate with "
            f"{planned.confirmed} ops measured alone"
        )
    if planned.repairs:
        lines += ["", "  repairs, with dB against the float student before and after"]
        lines += [f"    {one}" for one in planned.repairs]
    if len(plan.front) > 1:
        lines += ["", f"  {'latency':>10} {'bytes':>14} {'picture':>10}   of other plans (estimated)"]
        step = max(1, (len(plan.front) + SHOWN_POINTS - 1) // SHOWN_POINTS)
        lines += [
            f"  {point.latency_ratio:>10.3f} {point.bytes:>14,} {point.picture_psnr_db:>7.1f} dB"
            for point in plan.front[::step]
        ]
    return "\n".join([*lines, "", str(path)])
