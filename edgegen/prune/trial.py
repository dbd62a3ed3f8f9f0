"""A student that draws, tried after something was taken out of it: what that does to its pictures.

Pictures are drawn from prompts that calibration draws from, on the student's own trajectory, each from its own noise.
A loss is the mean squared error of the picture over the square of its peak, so that its decibels are PSNR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from edgegen.errors import UsageError
from edgegen.precision.pictures import PEAK_SQUARED
from edgegen.precision.prompts import prompts_for
from edgegen.students.sample import at_once, condition, decoder_input, initial_noise, sampler_table
from edgegen.students.student import Student

SAMPLES = 8
SEED = 2000
UNSEEN = 500
"""Seeds of unseen pictures come so much later."""


@dataclass(frozen=True)
class Trial:
    """`student` is what others are held against; `given` as `Student.given` makes it, a row a picture."""

    student: Student
    given: Tensor
    seeds: tuple[int, ...]
    steps: int

    @classmethod
    def of(
        cls, student: Student, steps: int | None = None, samples: int = SAMPLES, seed: int = SEED, unseen: bool = False
    ) -> Trial:
        """On the calibration prompts, evenly over them; `unseen`: on those half-way between, from other noise, to judge
        what was chosen on the first. UsageError for a student that draws nothing."""
        sampler = student.config.sampler
        if sampler is None:
            raise UsageError(
                f"student `{student.config.name}` draws no pictures: nothing says what may be taken out of it",
                hint="give a text-to-image or image-to-video student",
            )
        prompts = prompts_for(student)
        places = [(2 * i + unseen) * len(prompts) // (2 * samples) for i in range(min(samples, len(prompts)))]
        chosen = [prompts[place] for place in places]
        seed += UNSEEN if unseen else 0
        count = steps or sampler.default_steps
        sampler_table(student, count)
        return cls(student, student.given(chosen), tuple(range(seed, seed + len(chosen))), count)

    @cached_property
    def pictures(self) -> Tensor:
        return self.drawn(self.student)

    @cached_property
    def conditioning(self) -> dict[str, Tensor]:
        return condition(self.student, self.given)

    def loss(self, other: Student) -> float:
        """Of `other`, which may share components with the student."""
        return float((self.drawn(other) - self.pictures).double().square().mean()) / PEAK_SQUARED

    @torch.no_grad()
    def drawn(self, student: Student) -> Tensor:
        """What `student` draws, [N, ...] in -1..1."""
        return torch.cat([one.draw(student) for one in self.parts()])

    def parts(self) -> list[Trial]:
        """Trials of as many pictures as the networks take together."""
        if at_once(self.student) > 1:
            return [self]
        return [replace(self, given=row[None], seeds=(seed,)) for row, seed in zip(self.given, self.seeds, strict=True)]

    def draw(self, student: Student, noise: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """As `drawn`, and gradients flow from the pictures to what `noise` makes of the first latent."""
        same = student.conditioning is self.student.conditioning
        conditioning = self.conditioning if same else condition(student, self.given)
        seeds = list(self.seeds)
        denoiser, decoder = student.components["denoiser"], student.components["decoder"]
        x = noise(initial_noise(student, seeds))
        for index, step in enumerate(sampler_table(student, self.steps), start=1):
            known = {**conditioning, "latent": step.input_scale * x, "timestep": torch.full((len(x),), step.timestep)}
            prediction: Tensor = denoiser.module(*(known[spec.name] for spec in denoiser.inputs))
            x = step.sample * x + step.prediction * prediction
            if step.noise:
                x = x + step.noise * initial_noise(student, seeds, stream=index)
        made: Tensor = decoder.module(decoder_input(student, x))
        return made
