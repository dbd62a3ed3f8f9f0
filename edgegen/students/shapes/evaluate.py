"""Alignment of a `shapes` student over the held-back prompts, for a checkpoint or a built bundle alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from edgegen.bundle.open import MANIFEST
from edgegen.errors import UsageError
from edgegen.students.shapes.grammar import Scene, held_back
from edgegen.students.shapes.judge import shows

Picture = NDArray[np.floating[Any]]
Draw = Callable[[Sequence[str], Sequence[int]], Iterable[Picture]]
"""(prompts, seeds) -> one picture [3, 64, 64] in -1..1 for each."""


@dataclass(frozen=True)
class Subject:
    """Something that draws: a checkpoint through torch, or a bundle through one of its backends."""

    name: str
    steps: int
    draw: Draw


def subject_for(path: Path | None, steps: int | None, backend: str | None, level: str | None = None) -> Subject:
    """The checkpoint or bundle at `path` (None: the student that ships), at `steps` (None: its default); `level` of a
    checkpoint that holds several sizes.

    UsageError for a `backend` without a bundle, for steps that it was not distilled for, and for several sizes of which
    none is named.
    """
    if path is not None and (path / MANIFEST).is_file():
        if level is not None:
            raise UsageError("a bundle holds one size", hint="leave `--level` out")
        return _bundle(path, steps, backend)
    if backend is not None:
        raise UsageError("`--backend` is for bundles; a checkpoint is drawn with torch", hint="leave `--backend` out")
    from edgegen.prune.elastic import chosen_level
    from edgegen.students.load import load
    from edgegen.students.sample import draw_many, sampler_table
    from edgegen.students.shapes.family import WEIGHTS

    student = chosen_level(load(path or WEIGHTS), level)
    if student.config.sampler is None:
        raise UsageError(f"`{path}` draws no pictures", hint="evaluate a text-to-image student")
    count = steps or student.config.sampler.default_steps
    sampler_table(student, count)
    return Subject(student.config.name, count, partial(draw_many, student, steps=count))


def _bundle(path: Path, steps: int | None, backend: str | None) -> Subject:
    from edgegen.bundle.open import open_bundle
    from edgegen.bundle.run import Runtime

    bundle = open_bundle(path)
    runtime = Runtime(bundle, backend)
    assert bundle.manifest.sampler is not None
    count = steps or bundle.manifest.sampler.default_steps

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Picture]:
        with runtime:
            for prompt, seed in zip(prompts, seeds, strict=True):
                yield runtime.generate(prompt, seed, count).decoded[0]

    return Subject(f"{path} ({runtime.backend})", count, draw)


class AlignmentReport(BaseModel):
    """Share of prompts (0..1) whose picture shows what was asked, with how many prompts each share is over."""

    model_config = ConfigDict(frozen=True)

    steps: int
    prompts: int
    alignment: float
    one_object: float
    one_object_prompts: int
    two_objects: float
    two_objects_prompts: int
    shuffled: float
    """The same pictures judged against each other's prompts: what ignoring the prompt would score."""


def evaluate(draw: Draw, steps: int, limit: int | None = None) -> AlignmentReport:
    """Draw and judge the held-back prompts, prompt i from seed i; `limit` takes an even share of them."""
    scenes: list[Scene] = list(held_back())
    if limit is not None and limit < len(scenes):
        scenes = [scenes[i * len(scenes) // limit] for i in range(limit)]
    pictures = list(draw([scene.prompt() for scene in scenes], range(len(scenes))))
    right = np.array([shows(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)])
    one = np.array([len(scene.things) == 1 for scene in scenes])
    half = len(scenes) // 2
    others = scenes[half:] + scenes[:half]
    shuffled = np.array([shows(picture, scene) for picture, scene in zip(pictures, others, strict=True)])
    return AlignmentReport(
        steps=steps,
        prompts=len(scenes),
        alignment=float(right.mean()),
        one_object=float(right[one].mean()) if one.any() else float("nan"),
        one_object_prompts=int(one.sum()),
        two_objects=float(right[~one].mean()) if (~one).any() else float("nan"),
        two_objects_prompts=int((~one).sum()),
        shuffled=float(shuffled.mean()),
    )
