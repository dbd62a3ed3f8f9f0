"""The few-step loop in torch: the one place where the reference student draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgegen.bundle.noise import normal
from edgegen.errors import UsageError
from edgegen.students.conditions import chosen_conditions
from edgegen.students.sampler import SamplerStep
from edgegen.students.student import Student

FloatArray = NDArray[np.float32]
BATCH = 32


@dataclass(frozen=True)
class StepRecord:
    """One denoiser call: latent before, what the denoiser was given and said, latent after; each [B, ...] as the
    latent."""

    step: SamplerStep
    latent_in: Tensor
    model_input: Tensor
    prediction: Tensor
    latent_out: Tensor


def sampler_table(student: Student, steps: int) -> tuple[SamplerStep, ...]:
    """The student's folded schedule; UsageError names the step counts it was distilled for."""
    assert student.config.sampler is not None
    times = student.config.sampler.times
    if steps not in times:
        known = ", ".join(f"`--steps {count}`" for count in sorted(times))
        raise UsageError(f"student `{student.config.name}` was not distilled for {steps} steps", hint=f"use {known}")
    return student.config.sampler.table(steps)


def initial_noise(student: Student, seeds: list[int], stream: int = 0) -> Tensor:
    """Noise stream `stream` of each seed -> [len(seeds), *latent] fp32, the same numbers that every runtime draws."""
    assert student.config.latent is not None
    shape = student.config.latent.shape[1:]
    return torch.from_numpy(np.stack([normal(seed, stream, shape) for seed in seeds]))


def condition(student: Student, given: Tensor, conditions: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    """What the denoiser may ask for beside latent and time, by name, a row for each of `given` ([N, ...] as
    `Student.given` makes it): the conditioning component's outputs, and the student's scalars [N].

    `conditions` replaces some of the scalars; UsageError for one that the student does not have.
    """
    scalars = chosen_conditions(student.config.conditions, conditions, student.config.name)
    part = student.conditioning
    made = part.call({part.inputs[0].name: given})
    return {**made, **{name: torch.full((len(given),), value) for name, value in scalars.items()}}


@torch.no_grad()
def denoise(student: Student, conditioning: Mapping[str, Tensor], seeds: list[int], steps: int) -> Iterator[StepRecord]:
    """Run the denoiser from the seeds' noise; `conditioning` as `condition` gives it, with one row a seed."""
    denoiser = student.components["denoiser"]
    x = initial_noise(student, seeds)
    for index, step in enumerate(sampler_table(student, steps), start=1):
        model_input = step.input_scale * x
        given = {**conditioning, "latent": model_input, "timestep": torch.full((len(x),), step.timestep)}
        (prediction,) = denoiser.call(given).values()
        after = step.sample * x + step.prediction * prediction
        if step.noise:
            after = after + step.noise * initial_noise(student, seeds, stream=index)
        yield StepRecord(step, x, model_input, prediction, after)
        x = after


def decoder_input(student: Student, latent: Tensor) -> Tensor:
    """The denoised latent as the decoder wants it."""
    assert student.config.latent is not None
    return student.config.latent.scale * latent + student.config.latent.shift


@torch.no_grad()
def draw(student: Student, prompts: list[str], seeds: list[int], steps: int) -> Tensor:
    """Pictures [N, 3, H, W] or videos [N, 3, T, H, W], fp32 in -1..1, for `prompts`, each from its own seed."""
    for record in denoise(student, condition(student, student.given(prompts)), seeds, steps):
        last = record.latent_out
    return decode(student, decoder_input(student, last))


def at_once(student: Student) -> int:
    """How many pictures are drawn together; networks of videos take one at a time."""
    return 1 if student.config.task == "image-to-video" else BATCH


def decode(student: Student, ready: Tensor) -> Tensor:
    """What the decoder makes of `decoder_input`."""
    decoder = student.components["decoder"]
    (made,) = decoder.call({decoder.inputs[0].name: ready}).values()
    return made


def draw_many(student: Student, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Iterator[FloatArray]:
    """Pictures [3, H, W] or videos [3, T, H, W] one by one, drawn in batches."""
    batch = at_once(student)
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        yield from draw(student, list(prompts[rows]), list(seeds[rows]), steps).numpy()
