"""The few-step loop in torch: the one place where the reference student draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgegen.bundle.noise import normal
from edgegen.errors import UsageError
from edgegen.students.sampler import SamplerStep
from edgegen.students.student import Student

FloatArray = NDArray[np.float32]
BATCH = 32


@dataclass(frozen=True)
class StepRecord:
    """One denoiser call: latent before, what the denoiser was given and said, latent after; each [B, C, H, W]."""

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
    """Noise stream `stream` of each seed -> [len(seeds), C, H, W] fp32, the same numbers that every runtime draws."""
    assert student.config.latent is not None
    shape = student.config.latent.shape[1:]
    return torch.from_numpy(np.stack([normal(seed, stream, shape) for seed in seeds]))


@torch.no_grad()
def denoise(student: Student, context: Tensor, seeds: list[int], steps: int) -> Iterator[StepRecord]:
    """Run the denoiser from the seeds' noise; context is [B, L, D] with one row a seed."""
    denoiser = student.components["denoiser"].module
    x = initial_noise(student, seeds)
    for index, step in enumerate(sampler_table(student, steps), start=1):
        model_input = step.input_scale * x
        prediction = denoiser(model_input, torch.full((len(x),), step.timestep), context)
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
    """Pictures [N, 3, H, W] fp32 in -1..1 for `prompts`, each from its own seed."""
    context = student.components["text_encoder"].module(student.tokenize(prompts))
    records = list(denoise(student, context, seeds, steps))
    image: Tensor = student.components["decoder"].module(decoder_input(student, records[-1].latent_out))
    return image


def draw_many(student: Student, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Iterator[FloatArray]:
    """Pictures [3, H, W] one by one, drawn in batches of 32."""
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        yield from draw(student, list(prompts[rows]), list(seeds[rows]), steps).numpy()
