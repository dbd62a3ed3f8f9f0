"""Alignment of a `shapes` student over the held-back prompts, for a checkpoint or a built bundle alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from edgegen.students.shapes.grammar import Scene, held_back
from edgegen.students.shapes.judge import shows

Picture = NDArray[np.floating]
Draw = Callable[[Sequence[str], Sequence[int]], Iterable[Picture]]
"""(prompts, seeds) -> one picture [3, 64, 64] in -1..1 for each."""


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
