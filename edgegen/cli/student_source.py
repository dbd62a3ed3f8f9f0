"""The options of every command that opens a student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--lora`, `--timesteps`, `--guidance`, `--arch`, `--arch-config`, `--inputs`: what `Source.of` reads."""
    options = (
        click.option(
            "--lora",
            multiple=True,
            metavar="FILE[:SCALE]",
            help="Merge these adapters (.safetensors; diffusers', kohya's or peft's names) into the weights.",
        ),
        click.option(
            "--timesteps",
            multiple=True,
            metavar="T,T,...",
            help="Sample at these times and not at the scheduler's own, as `999,749,499,249` for DMD2; one list a "
            "number of steps, the first is the default.",
        ),
        click.option(
            "--guidance",
            type=click.FloatRange(0, 100),
            help="What a network that is told its guidance is told: LCM, SANA-Sprint. Default: its pipeline's own.",
        ),
        click.option(
            "--arch",
            metavar="PACKAGE.MODULE:FACTORY",
            help="The network is made by this function of your own, which is imported and run; MODEL is its weights.",
        ),
        click.option(
            "--arch-config", type=click.Path(path_type=Path), metavar="FILE", help="JSON that FACTORY is called with."
        ),
        click.option(
            "--inputs",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="An .npz with an array for each input: what a student without prompts is measured on.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function
