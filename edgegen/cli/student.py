"""`edgegen student`: a new student of a published family, a student in one file, how well a student draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgegen.cli.console import Output, reporting
from edgegen.cli.group import SuggestingGroup
from edgegen.cli.student_source import source_options
from edgegen.errors import UsageError

if TYPE_CHECKING:
    from edgegen.students.student import Student


@click.group("student", cls=SuggestingGroup)
def command() -> None:
    """Make, pack or evaluate a student."""


@command.command("pack")
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option(
    "--output", "-o", "destination", type=click.Path(path_type=Path), default=Path("model.pt"), show_default=True
)
@click.option("--config", "config", type=click.Path(path_type=Path), help="Config of a SOURCE that is tensors alone.")
@source_options
@reporting
def pack(source: Path | None, destination: Path, config: Path | None, output: Output, **options: Any) -> None:
    """Write SOURCE (default: the shapes student that ships) as one `.pt` of plain data.

    With --config, SOURCE may be a plain state dict or a .safetensors without a config beside it. With --arch, SOURCE is
    the state dict of a module of yours, and a `.pt2` is written, which needs none of your code any more.
    """
    from edgegen.students.checkpoint import save_pt
    from edgegen.students.exported_program import ARCHITECTURE, save_pt2
    from edgegen.students.load import load_with_config
    from edgegen.students.shapes.family import WEIGHTS
    from edgegen.students.source import Source

    if config is not None and source is None:
        raise UsageError("`--config` describes a SOURCE, and none was given", hint="name the file of tensors")
    how = Source.of(options)
    if config is not None and how != Source():
        raise UsageError("`--config` is for tensors that nothing is done to", hint="pack first, then merge or plan")
    student = how.open(source or WEIGHTS) if source is None or config is None else load_with_config(source, config)
    graph = tuple(part.architecture for part in student.config.components.values()) == (ARCHITECTURE,)
    if graph and destination == Path("model.pt"):
        destination = Path("model.pt2")
    destination.parent.mkdir(parents=True, exist_ok=True)
    if graph:
        save_pt2(student, destination)
    else:
        save_pt(student, destination)
    data = {"path": str(destination), "name": student.config.name, "sha256": student.fingerprint}
    output.report(data, str(destination))


@command.command("new")
@click.argument("family")
@click.option("--size", default="full", show_default=True, help="`full` is the published one, `tiny` one for trying.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random weights.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A `tokenizer.json` in place of the stand-in.")
@click.option(
    "--output", "-o", "destination", type=click.Path(path_type=Path), default=Path("model.pt"), show_default=True
)
@reporting
def new_command(family: str, size: str, seed: int, tokenizer: Path | None, destination: Path, output: Output) -> None:
    """Write a student of FAMILY with its exact public configuration and random weights.

    It builds, runs and takes as long as the published one; what it draws means nothing before it is trained.
    """
    from edgegen.students.archive import read_small
    from edgegen.students.checkpoint import save_pt
    from edgegen.students.families.registry import config_of, new

    config_of(family, size)  # refuses an unknown name before it writes or reads anything
    text = None
    if tokenizer is not None:
        try:
            text = read_small(tokenizer).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"`{tokenizer}` cannot be read as a tokenizer: {error}") from error
    with output.progress() as progress:
        progress.stage(f"{family} {size}: random weights", 2)
        student = new(family, size, seed, text)
        progress.advance()
        destination.parent.mkdir(parents=True, exist_ok=True)
        save_pt(student, destination)
        progress.advance()
    counts = _parameters(student)
    for note in student.config.notes:
        output.say(f"note: {note}")
    data = {
        "path": str(destination),
        "family": family,
        "size": size,
        "seed": seed,
        "name": student.config.name,
        "task": student.config.task,
        "parameters": counts,
        "notes": list(student.config.notes),
        "sha256": student.fingerprint,
    }
    output.report(data, str(destination))


@command.command("families")
@reporting
def families_command(output: Output) -> None:
    """The families that `edgegen student new` knows: sizes, parameters, sources."""
    from edgegen.students.families.registry import families, parameters

    found = [
        {
            "name": one.name,
            "summary": one.summary,
            "sizes": {size: parameters(build()) for size, build in one.sizes.items()},
            "sources": list(one.sources),
            "readings": list(one.readings),
        }
        for one in families().values()
    ]
    output.report({"families": found}, lambda: "\n\n".join(_family_text(one) for one in found))


def _parameters(student: Student) -> dict[str, int]:
    return {
        name: sum(tensor.numel() for tensor in part.module.parameters()) for name, part in student.components.items()
    }


def _family_text(one: dict[str, Any]) -> str:
    lines = [f"{one['name']}  {one['summary']}"]
    for size, counts in one["sizes"].items():
        parts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in counts.items())
        lines.append(f"  --size {size:6}  {sum(counts.values()) / 1e6:.1f} M parameters: {parts}")
    lines += [f"  from {source}" for source in one["sources"]]
    lines += [f"  our reading: {reading}" for reading in one["readings"]]
    return "\n".join(lines)


@command.command("level")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("name", required=False)
@click.option(
    "--output", "-o", "destination", type=click.Path(path_type=Path), default=Path("model.pt"), show_default=True
)
@source_options
@reporting
def level_command(source: Path, name: str | None, destination: Path, output: Output, **options: Any) -> None:
    """Take the size NAME out of SOURCE, a checkpoint that holds several nested ones; without NAME, list them."""
    from edgegen.prune.elastic import at_level
    from edgegen.students.checkpoint import save_pt
    from edgegen.students.source import Source

    student = Source.of(options).open(source)
    if name is None:
        names = list(student.config.levels)
        sizes = {one: sum(_parameters(at_level(student, one)).values()) for one in names}
        shown = "\n".join(f"{one:16} {count:,} parameters" for one, count in sizes.items())
        output.report({"levels": sizes}, shown or f"`{student.config.name}` has one size")
        return
    made = at_level(student, name)
    destination.parent.mkdir(parents=True, exist_ok=True)
    save_pt(made, destination)
    data = {"path": str(destination), "level": name, "parameters": _parameters(made), "sha256": made.fingerprint}
    output.report(data, str(destination))


@command.command("eval")
@click.argument("subject", type=click.Path(path_type=Path), required=False)
@click.option("--steps", type=click.IntRange(min=1), help="Default: the student's own.")
@click.option("--backend", help="For a bundle: which of its backends draws.")
@click.option("--level", metavar="NAME", help="Of a checkpoint that holds several sizes: which one draws.")
@click.option("--limit", type=click.IntRange(min=2), help="An even share of the held-back prompts instead of all.")
@reporting
def eval_command(
    subject: Path | None,
    steps: int | None,
    backend: str | None,
    level: str | None,
    limit: int | None,
    output: Output,
) -> None:
    """Alignment of SUBJECT, a checkpoint or a bundle, over the held-back prompts (default: the student that ships)."""
    from edgegen.students.shapes.evaluate import evaluate, subject_for

    drawer = subject_for(subject, steps, backend, level)
    with output.progress() as progress:
        progress.stage(f"draw with {drawer.name}, {drawer.steps} {'step' if drawer.steps == 1 else 'steps'}", 0)
        report = evaluate(drawer.draw, drawer.steps, limit)
        progress.advance()
    output.report(
        {"subject": drawer.name, **report.model_dump()},
        lambda: (
            f"alignment over {report.prompts} held-back prompts, {drawer.name}, steps {report.steps}\n"
            f"  all          {report.alignment:.3f}\n"
            f"  one object   {report.one_object:.3f}  ({report.one_object_prompts} prompts)\n"
            f"  two objects  {report.two_objects:.3f}  ({report.two_objects_prompts} prompts)\n"
            f"  shuffled     {report.shuffled:.3f}  (the same pictures under each other's prompts)"
        ),
    )
