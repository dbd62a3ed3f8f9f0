"""How well a pruned student draws prompts that it does not learn from, held against the one that it was cut out of."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from edgegen.precision.prompts import prompts_for
from edgegen.prune.training import Judged
from edgegen.students.sample import draw_many
from edgegen.students.shapes.grammar import Scene, training_scenes
from edgegen.students.shapes.judge import alignment
from edgegen.students.student import Student

SCENES = 120
"""Of the `shapes` student, that judge: of those that its training may draw, so that what `student eval` asks for stays
unseen."""
TWO_OBJECTS = 0.75
HELD_BACK = 4
"""Prompts of any other student, at most a third of all."""
SEED = 300_000


@dataclass(frozen=True)
class Prompts:
    """Those to learn from, and those to be judged on; `scenes` says what the latter mean, of `shapes` alone."""

    learning: tuple[str, ...]
    judging: tuple[str, ...]
    scenes: tuple[Scene, ...] = ()


def prompts_to_heal(student: Student) -> Prompts:
    """The whole grammar of `shapes` but for what `student eval` asks; of any other student the calibration prompts."""
    if student.config.name == "shapes":
        one, two = training_scenes()
        chosen = random.Random(20260712)
        judging = chosen.sample(one, round((1 - TWO_OBJECTS) * SCENES)) + chosen.sample(
            two, round(TWO_OBJECTS * SCENES)
        )
        hidden = set(judging)
        # Far more pairs than single objects: each of the latter is drawn as often as eight pairs.
        learning = [scene.prompt() for scene in one if scene not in hidden] * 8
        learning += [scene.prompt() for scene in two if scene not in hidden]
        return Prompts(tuple(learning), tuple(scene.prompt() for scene in judging), tuple(judging))
    known = prompts_for(student)
    held = max(1, min(HELD_BACK, len(known) // 3))
    return Prompts(known[:-held] or known, known[-held:])


@dataclass(frozen=True)
class Judge:
    """Draws `prompts.judging` at the student's own number of steps, each from a seed of its own."""

    teacher: Student
    prompts: Prompts

    def __call__(self, student: Student) -> Judged:
        made = self._draw(student)
        error = float((made - self._wanted).double().square().mean())
        # A picture spans -1..1.
        decibels = 10 * float(np.log10(4 / max(error, 1e-15)))
        if not self.prompts.scenes:
            return Judged(psnr_db=decibels)
        return Judged(psnr_db=decibels, alignment=alignment(list(made.numpy()), list(self.prompts.scenes)))

    @cached_property
    def of_teacher(self) -> float | None:
        """Its alignment."""
        return alignment(list(self._wanted.numpy()), list(self.prompts.scenes)) if self.prompts.scenes else None

    @cached_property
    def _wanted(self) -> Tensor:
        return self._draw(self.teacher)

    def _draw(self, student: Student) -> Tensor:
        assert student.config.sampler is not None
        seeds = [SEED + i for i in range(len(self.prompts.judging))]
        steps = student.config.sampler.default_steps
        return torch.from_numpy(np.stack(list(draw_many(student, self.prompts.judging, seeds, steps))))
