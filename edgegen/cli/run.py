"""`edgegen run`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgegen.cli.console import Output, reporting
from edgegen.errors import UsageError

if TYPE_CHECKING:
    from edgegen.bundle.open import Bundle


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="What to draw, for a student that starts from text.")
@click.option("--image", "start", type=click.Path(path_type=Path), help="For a student that starts from a picture.")
@click.option(
    "--inputs", "arrays", type=click.Path(path_type=Path), help="For a single network: an .npz, an array an input."
)
@click.option(
    "--pixels",
    type=click.Choice(("0..1", "-1..1", "0..255")),
    default="0..1",
    show_default=True,
    help="Black and white of a single network that takes and gives a picture.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which noise to start from.")
@click.option("--steps", type=int, help="Sampling steps. Default: what the bundle was built for.")
@click.option(
    "--condition", "conditions", metavar="NAME=VALUE", multiple=True, help="A scalar of the student; may be repeated."
)
@click.option(
    "--fps", type=click.FloatRange(0.1, 100), help="Frames a second of a video. Default: the student's, else 16."
)
@click.option(
    "-o",
    "--output",
    "picture",
    type=click.Path(path_type=Path),
    help="What to write. A picture: .png. A video: .gif, .webp, .mp4, or .png for six of its frames side by side. "
    "Outputs for `--inputs`: .npz.  [default: out.png, of a video out.gif, out.npz]",
)
@click.option("--backend", metavar="NAME", help="Default: the first in the target's order whose runtime is here.")
@click.option("--skip-hashes", is_flag=True, help="Trust the bundle's files instead of hashing them all first.")
@reporting
def command(
    bundle: Path,
    prompt: str | None,
    start: Path | None,
    arrays: Path | None,
    pixels: str,
    seed: int,
    steps: int | None,
    conditions: tuple[str, ...],
    fps: float | None,
    picture: Path | None,
    backend: str | None,
    skip_hashes: bool,
    output: Output,
) -> None:
    """Draw a picture or a video with BUNDLE on this machine, and print the path of the file.

    A bundle of a single network is called once: on `--inputs`, and where it takes a picture and gives one, as
    super-resolution does, on `--image`. A picture to start from is turned as its EXIF says, scaled until it covers the
    student's size, and cut to it around its middle. Core ML packages are executed by Core ML on macOS and by edgegen's
    reference evaluator elsewhere, which is said.
    """
    from edgegen.bundle.film import DEFAULT_RATE, check_film_path, write_film
    from edgegen.bundle.open import open_bundle
    from edgegen.bundle.picture import check_png_path, write_png
    from edgegen.bundle.run import Runtime
    from edgegen.bundle.start_picture import read_start_picture

    asked = [
        f"`{name}`"
        for name, value in (("--prompt", prompt), ("--image", start), ("--inputs", arrays))
        if value is not None
    ]
    if len(asked) != 1:
        raise UsageError(
            f"{' and '.join(asked)} exclude each other"
            if asked
            else "one of `--prompt`, `--image` and `--inputs` is needed",
            hint=f"`edgegen run {shlex.quote(str(bundle))} --prompt 'a red circle'`, or for a student that starts "
            "from a picture `--image in.png`, for a single network `--inputs inputs.npz`",
        )
    scalars = _scalars(conditions)
    if picture is not None and picture.suffix.lower() == ".png":
        check_png_path(picture)  # before a large bundle is hashed
    opened = open_bundle(bundle, check_hashes=not skip_hashes)
    if arrays is not None or (start is not None and opened.manifest.task == "single"):
        return _call(opened, backend, arrays or start, pixels, picture, output)
    film = opened.manifest.task == "image-to-video"
    picture = picture or Path("out.gif" if film else "out.png")
    (check_film_path if film else check_png_path)(picture)
    warnings: list[str] = []
    with output.progress() as progress:
        progress.stage("load", 0)
        with Runtime(opened, backend) as runtime:
            if start is None:
                drawn = runtime.generate(prompt or "", seed, steps, scalars, progress)
            else:
                given, remarks = read_start_picture(start, *runtime.start_size())
                warnings += remarks
                drawn = runtime.generate(given, seed, steps, scalars, progress)
        if film:
            rate = fps or opened.manifest.frames_per_second or DEFAULT_RATE
            progress.stage("write, frame by frame", len(drawn.frames))
            write_film(picture, drawn.frames, rate, progress.advance)
        else:
            write_png(picture, drawn.image)
    warnings += drawn.warnings
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
        "image": None if start is None else str(start),
        "conditions": drawn.conditions,
        "seed": drawn.seed,
        "steps": drawn.steps,
        "size": [drawn.frames.shape[2], drawn.frames.shape[1]],
        "frames": len(drawn.frames),
        "seconds": drawn.timings,
        "warnings": warnings,
    }
    output.report(report, str(picture))


def _call(
    opened: Bundle, backend: str | None, given: Path | None, pixels: str, target: Path | None, output: Output
) -> None:
    """Call a single network on the arrays or the picture at `given`."""
    from edgegen.bundle.call import RANGES, Network, check_arrays_path, write_arrays
    from edgegen.bundle.picture import check_png_path, write_png
    from edgegen.bundle.start_picture import read_start_picture
    from edgegen.students.given_inputs import read_inputs, stacked

    assert given is not None
    shown = given.suffix != ".npz"
    target = target or Path("out.png" if shown else "out.npz")
    (check_png_path if shown else check_arrays_path)(target)
    warnings: list[str] = []
    with output.progress() as progress:
        progress.stage("load", 0)
        with Network(opened, backend) as network:
            if shown:
                start, remarks = read_start_picture(given, *network.picture_size())
                warnings += remarks
                picture, *seconds = network.picture(start, RANGES[pixels])
                write_png(target, picture)
                shapes = {network.outputs[0].name: list(picture.shape)}
            else:
                read = read_inputs(given)
                stack = stacked(network.inputs, read, given.name)
                given_once = all(read[spec.name].shape == spec.shape for spec in network.inputs)
                progress.stage("call", len(next(iter(stack.values()))))
                called = network.call(stack, progress.advance)
                outputs = called.outputs
                if given_once:  # what came without a dimension for samples goes without it
                    outputs = {name: value[0] for name, value in outputs.items()}
                write_arrays(target, outputs)
                seconds = list(called.seconds)
                shapes = {name: list(value.shape) for name, value in outputs.items()}
    if shown:
        output.say(f"pixels are {pixels} to the network; others are told by `--pixels`")
    for warning in warnings:
        output.say(f"warning: {warning}")
    calls = "1 call" if len(seconds) == 1 else f"{len(seconds)} calls"
    by = (
        f", executed by {network.executed_by}" if network.executed_by else f", {sum(seconds) * 1000:.0f} ms once loaded"
    )
    output.say(f"{calls} of `{network.backend}`{by}")
    report = {
        "written": str(target),
        "bundle": str(opened.root),
        "backend": network.backend,
        "executed_by": network.executed_by,
        "given": str(given),
        "outputs": shapes,
        "seconds": seconds,
        "warnings": warnings,
    }
    output.report(report, str(target))


def _scalars(conditions: tuple[str, ...]) -> dict[str, float]:
    """`NAME=VALUE` pairs; UsageError for what is none."""
    found = {}
    for text in conditions:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError as error:
            raise UsageError(f"`--condition {text}` is no NAME=VALUE", hint="`--condition flow_score=2.0`") from error
    return found
