"""`edgegen student`: pack a student into one file, evaluate a student or a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from edgegen.cli.console import Output, reporting
from edgegen.cli.group import SuggestingGroup
from edgegen.errors import UsageError


@click.group("student", cls=SuggestingGroup)
def command() -> None:
    """Pack or evaluate the student that ships."""


@command.command("pack")
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option(
    "--output", "-o", "destination", type=click.Path(path_type=Path), default=Path("model.pt"), show_default=True
)
@click.option("--config", "config", type=click.Path(path_type=Path), help="Config of a SOURCE that is tensors alone.")
@reporting
def pack(source: Path | None, destination: Path, config: Path | None, output: Output) -> None:
    """Write SOURCE (default: the shapes student that ships) as one `.pt` of plain data.

    With --config, SOURCE may be a plain state dict or a .safetensors without a config beside it.
    """
    from edgegen.students.checkpoint import save_pt
    from edgegen.students.load import load, load_with_config
    from edgegen.students.shapes.family import WEIGHTS

    if config is not None and source is None:
        raise UsageError("`--config` describes a SOURCE, and none was given", hint="name the file of tensors")
    student = load(source or WEIGHTS) if source is None or config is None else load_with_config(source, config)
    destination.parent.mkdir(parents=True, exist_ok=True)
    save_pt(student, destination)
    data = {"path": str(destination), "name": student.config.name, "sha256": student.fingerprint}
    output.report(data, str(destination))


@command.command("eval")
@click.argument("subject", type=click.Path(path_type=Path), required=False)
@click.option("--steps", type=click.IntRange(min=1), help="Default: the student's own.")
@click.option("--backend", help="For a bundle: which of its backends draws.")
@click.option("--limit", type=click.IntRange(min=2), help="An even share of the held-back prompts instead of all.")
@reporting
def eval_command(
    subject: Path | None, steps: int | None, backend: str | None, limit: int | None, output: Output
) -> None:
    """Alignment of SUBJECT, a checkpoint or a bundle, over the held-back prompts (default: the student that ships)."""
    from edgegen.students.shapes.evaluate import evaluate, subject_for

    drawer = subject_for(subject, steps, backend)
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
