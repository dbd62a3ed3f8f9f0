"""`edgegen tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgegen.cli.amounts import milliseconds_or_share, share
from edgegen.cli.console import Output, clean, names_between_commas, reporting
from edgegen.cli.student_source import source_options

if TYPE_CHECKING:
    from edgegen.prune.tune import Tuned


def _latency(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, Any]:
    """`120ms`; `0.6x` or `60%` of what it is."""
    if value is None:
        return {}
    number, milliseconds = milliseconds_or_share(value)
    return {"max_latency_ms" if milliseconds else "max_latency": number}


def _share(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    return None if value is None else share(value, "a share of what it is as `60%` or `0.6x`")


def _precisions(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """() for `none`."""
    if value is None:
        return None
    return () if value.strip() == "none" else tuple(dict.fromkeys(one.strip() for one in value.split(",")))


@click.command("tune")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="Device to tune for.")
@click.option(
    "--backend",
    "backends",
    callback=names_between_commas,
    metavar="NAME[,NAME]|all",
    help="Default: what the target prefers. The front is that of the first.",
)
@click.option(
    "--component",
    "components",
    callback=names_between_commas,
    metavar="NAME[,NAME]",
    help="What may be cut. Default: denoiser,decoder.",
)
@click.option(
    "--precision-set",
    "precisions",
    callback=_precisions,
    metavar="LIST|none",
    help="What ops may have beside the float: `w8a8,w8`; `none` decides widths alone. Default: all of the target's.",
)
@click.option("--points", type=click.IntRange(min=2, max=64), default=8, show_default=True, help="Of the front.")
@click.option("--best", type=click.IntRange(min=1), default=3, show_default=True, help="Recipes that are written.")
@click.option(
    "--min-psnr",
    type=click.FloatRange(0, 150),
    default=15.0,
    show_default=True,
    help="dB of the picture before healing, below which a point is no recipe.",
)
@click.option("--max-latency", callback=_latency, metavar="MS|SHARE", help="`120ms` a picture, or `0.6x`; estimates.")
@click.option("--max-macs", callback=_share, metavar="SHARE", help="Of a picture's: `60%`.")
@click.option("--max-size", callback=_share, metavar="SHARE", help="Of the fp32 weights: `30%`.")
@click.option("--depth/--no-depth", default=True, show_default=True, help="Whole blocks may be passed by.")
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps of the pictures that are judged.")
@click.option("--samples", type=click.IntRange(min=2), default=12, show_default=True, help="How many pictures.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, through joblib.")
@click.option(
    "--parallel",
    metavar="NAME|dask=ADDRESS",
    help="A joblib backend; `dask=tcp://HOST:8786` gives work to a Dask scheduler. Default: processes here.",
)
@click.option(
    "--output",
    "-o",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("tuned"),
    show_default=True,
    help="Folder of recipes (.json) and the students that they leave (.pt).",
)
@source_options
@reporting
def command(
    model: Path,
    target: str,
    backends: tuple[str, ...] | None,
    components: tuple[str, ...] | None,
    max_latency: dict[str, Any],
    parallel: str | None,
    folder: Path,
    output: Output,
    lora: tuple[str, ...],
    arch: str | None,
    arch_config: Path | None,
    inputs: Path | None,
    timesteps: tuple[str, ...],
    guidance: float | None,
    **asked: Any,
) -> None:
    """Choose widths, blocks and precisions of MODEL together: walk the front of latency and quality for a device.

    The fastest points that still draw are written as recipes, each with the student that it leaves. That wants healing
    (`edgegen prune --recipe`), and then precisions (`edgegen plan --recipe`). Latencies are estimates from kernels
    timed on this machine.
    """
    from joblib import parallel_config

    from edgegen.build.recipe import chosen_backends
    from edgegen.cache import Cache
    from edgegen.errors import UsageError
    from edgegen.prune.recipe import write_recipe
    from edgegen.prune.tune import TuneOptions, tune
    from edgegen.students.checkpoint import save_pt
    from edgegen.students.source import Source
    from edgegen.targets import load_target

    device = load_target(target)
    names = chosen_backends(device, backends)
    student = Source(lora, arch, arch_config, inputs, timesteps, guidance).open(model)
    options = TuneOptions(components=components or ("denoiser", "decoder"), **asked, **max_latency)
    workers, _, address = (parallel or "loky").partition("=")
    try:
        if address and workers != "dask":
            raise ValueError(f"`{workers}` has no scheduler whose address could be given")
        chosen = parallel_config(backend=workers, **({"scheduler_host": address} if address else {}))
    except (ValueError, ImportError, OSError, TypeError) as error:
        raise UsageError(
            f"joblib cannot work with `{parallel}`: {str(error).splitlines()[0]}",
            hint="leave `--parallel` out for local processes; a Dask scheduler is `--parallel dask=tcp://HOST:8786`",
        ) from error
    with output.progress() as progress, chosen:
        tuned = tune(student, device, names, options, Cache(None), progress)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (recipe, left) in enumerate(tuned.recipes, start=1):
        path = folder / f"{student.config.name}-{device.name}-{number}.json"
        save_pt(left, path.with_suffix(".pt"))
        write_recipe(path, recipe)
        paths.append(path)
    data = {
        "recipes": [str(path) for path in paths],
        "latency_ms_estimated": tuned.latency_ms,
        "rank_correlation_of_blocks": tuned.correlation,
        "kernel_fit_error": tuned.surface_error,
        "front": [one.plain() for one in tuned.front],
    }
    output.report(data, lambda: clean(_text(tuned, paths, model, device.name, names)))


def _text(tuned: Tuned, paths: list[Path], model: Path, target: str, backends: tuple[str, ...]) -> str:
    lines = ["shares of what the student costs; latency is estimated, picture and alignment are unhealed and in float"]
    head = "".join(f"{f'latency {name}':>20}" for name in backends)
    lines += ["", f"  {head}{'macs':>8}{'bytes':>8}{'blocks':>8}{'int8..':>8}{'estimated':>12}{'drawn':>10}  aligned"]
    for one in tuned.front:
        shares = "".join(f"{one.costs[f'latency {name}']:>20.3f}" for name in backends)
        aligned = "" if one.alignment is None else f"{one.alignment:>9.3f}"
        lines.append(
            f"  {shares}{one.costs['macs']:>8.3f}{one.costs['bytes']:>8.3f}{one.removed:>8}{one.compressed:>8}"
            f"{one.psnr_estimated:>9.1f} dB{one.psnr:>7.1f} dB{aligned}"
        )
    lines.append("")
    for name in backends:
        speed = tuned.speed[name]
        where = f"this machine's {name}" if speed is None else f"{target} with {name}"
        said = "the target file does not say how fast it is" if speed is None else speed.said()
        lines.append(f"  whole student {tuned.latency_ms[f'latency {name}']:.3g} ms on {where} (estimated; {said})")
    if tuned.correlation is not None:
        lines.append(
            f"  blocks: rank correlation {tuned.correlation:.3f} of first-order estimates with measured removal"
        )
    for path, (recipe, _) in zip(paths, tuned.recipes, strict=True):
        healed, on = path.with_name(f"{path.stem}-healed.pt"), f"--target {target} --backend {','.join(backends)}"
        lines += ["", str(path), f"  {path.with_suffix('.pt')} is what it leaves, not healed"]
        lines.append(f"  heal: edgegen prune {model} {on} --recipe {path} --heal 2000 -o {healed}")
        if recipe.precisions:
            lines.append(f"  then: edgegen plan {healed} {on} --recipe {path}")
    if not paths:
        lines += ["", "no point draws well enough for a recipe: lower `--min-psnr`, or ask for less"]
    return "\n".join(lines)
