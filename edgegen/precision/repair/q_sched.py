"""Q-Sched: the sampler's coefficients, learned again for the quantized denoiser.

    x <- a * sample * x + b * prediction * denoiser(input_scale * x, timestep) + noise * fresh noise

with (a, b) of each step in turn by least squares, so that over the calibration prompts the quantized trajectory lands
where the float one is after that step. The next step is learned from where the corrected one ended. Two numbers a step,
no gradients, and nothing changes but the table that the bundle carries. (Idea: Q-Sched, arXiv 2509.01624, which learns
them by search against a loss on pictures.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgegen.errors import EdgegenError, UsageError
from edgegen.precision.repair.tensors import mean
from edgegen.students.sample import initial_noise, sampler_table
from edgegen.students.sampler import SamplerStep
from edgegen.students.student import Student
from edgegen.verify.metrics import sqnr_db

Denoiser = Callable[[Tensor, SamplerStep, Tensor], Tensor]
"""(model input, shaped as the latent; step; what it is asked for, as `edgegen.precision.conditioning` packs it) ->
prediction, shaped as the latent."""
Factors = tuple[tuple[float, float], ...]
RIDGE = 1e-4
"""Pull of each factor towards 1, as a share of what it multiplies: two values that nearly go together leave one of the
factors open."""
FARTHEST = 0.25
"""A factor farther than this from 1 says that the denoiser is broken, not that the schedule is."""


@dataclass(frozen=True)
class QSched:
    """`factors` of each step's (sample, prediction); () where they would make the held-out prompts worse. SQNR of the
    last latent against the float one, on the held-out prompts."""

    factors: Factors
    before_db: float
    after_db: float
    reason: str = ""


def learn(
    student: Student,
    float_denoiser: Denoiser,
    quantized_denoiser: Denoiser,
    contexts: Sequence[Tensor],
    steps: int,
    *,
    quantized_contexts: Sequence[Tensor] | None = None,
    seed: int = 0,
    held_out: int = 0,
) -> QSched:
    """Factors for `steps` steps, learned on `contexts` (encodings, [1, ...]; prompt i from seed `seed` + i).

    The last `held_out` (a quarter, where 0) are judged on and not learned from. `quantized_contexts` are what the
    quantized text encoder makes of the same prompts. UsageError for fewer than four prompts; EdgegenError when a
    prediction is not finite.
    """
    if len(contexts) < 4:
        raise UsageError(f"{len(contexts)} prompts are too few to learn a schedule from", hint="give at least four")
    kept = held_out or max(1, len(contexts) // 4)
    given = list(quantized_contexts or contexts)
    table = sampler_table(student, steps)
    seeds = [seed + index for index in range(len(contexts))]
    floats = [_trajectory(student, float_denoiser, table, one, at) for one, at in zip(contexts, seeds, strict=True)]
    learning = slice(0, len(contexts) - kept)
    factors = _fit(student, quantized_denoiser, table, given[learning], seeds[learning], floats[learning])
    wanted = torch.cat([one[-1] for one in floats[len(contexts) - kept :]]).numpy()

    def judged(chosen: Factors) -> float:
        ends = [
            _trajectory(student, quantized_denoiser, table, one, at, chosen)[-1]
            for one, at in zip(given[-kept:], seeds[-kept:], strict=True)
        ]
        return sqnr_db(wanted, torch.cat(ends).numpy())

    before, after = judged(tuple((1.0, 1.0) for _ in table)), judged(factors)
    if max(abs(one - 1.0) for pair in factors for one in pair) > FARTHEST:
        return QSched((), before, before, f"factors as far from 1 as {factors} mean that the denoiser is broken")
    if after <= before:
        return QSched((), before, before, f"prompts that were held out would go from {before:.2f} to {after:.2f} dB")
    return QSched(factors, before, after)


def applied(table: Sequence[SamplerStep], factors: Factors) -> tuple[SamplerStep, ...]:
    """The sampler's table with `factors` in it; the table itself where there are none. UsageError for another number
    of steps."""
    if not factors:
        return tuple(table)
    if len(factors) != len(table):
        raise UsageError(f"there are factors for {len(factors)} steps, and the table has {len(table)}")
    return tuple(
        step.model_copy(update={"sample": a * step.sample, "prediction": b * step.prediction})
        for step, (a, b) in zip(table, factors, strict=True)
    )


def _noise(student: Student, seed: int, step: SamplerStep, index: int) -> Tensor | float:
    return step.noise * initial_noise(student, [seed], stream=index) if step.noise else 0.0


def _predict(denoiser: Denoiser, step: SamplerStep, x: Tensor, context: Tensor) -> Tensor:
    with torch.no_grad():
        prediction = denoiser(step.input_scale * x, step, context)
    if not torch.isfinite(prediction).all():
        raise EdgegenError(f"the denoiser gives NaN or infinity at timestep {step.timestep:g}")
    return prediction


def _trajectory(
    student: Student,
    denoiser: Denoiser,
    table: Sequence[SamplerStep],
    context: Tensor,
    seed: int,
    factors: Factors = (),
) -> list[Tensor]:
    """The latent after each step."""
    x, after = initial_noise(student, [seed]), []
    for index, step in enumerate(applied(table, factors), start=1):
        prediction = _predict(denoiser, step, x, context)
        x = step.sample * x + step.prediction * prediction + _noise(student, seed, step, index)
        after.append(x)
    return after


def _fit(
    student: Student,
    denoiser: Denoiser,
    table: Sequence[SamplerStep],
    contexts: Sequence[Tensor],
    seeds: Sequence[int],
    floats: Sequence[Sequence[Tensor]],
) -> Factors:
    latents = [initial_noise(student, [seed]) for seed in seeds]
    factors: list[tuple[float, float]] = []
    for index, step in enumerate(table, start=1):
        parts, targets = [], []
        for x, context, seed, wanted in zip(latents, contexts, seeds, floats, strict=True):
            prediction = _predict(denoiser, step, x, context)
            fresh = _noise(student, seed, step, index)
            parts.append(torch.stack([(step.sample * x).flatten(), (step.prediction * prediction).flatten()]).double())
            targets.append((wanted[index - 1] - fresh).flatten().double())
        a, b = _least_squares(parts, targets)
        factors.append((a, b))
        latents = [
            (a * part[0] + b * part[1]).float().view_as(x) + _noise(student, seed, step, index)
            for part, x, seed in zip(parts, latents, seeds, strict=True)
        ]
    return tuple(factors)


def _least_squares(parts: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[float, float]:
    """(a, b) of least |a p0 + b p1 - target|^2, drawn a little towards (1, 1); each p [2, n]."""
    products = mean([part @ part.T for part in parts])
    rest = mean([part @ (target - part.sum(0)) for part, target in zip(parts, targets, strict=True)])
    pull = RIDGE * products.diagonal().clamp(min=1e-30).diag()
    found = torch.linalg.solve(products + pull, rest)
    return 1.0 + float(found[0]), 1.0 + float(found[1])
