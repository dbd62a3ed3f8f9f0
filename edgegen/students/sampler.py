"""The sampling schedule, folded: a few coefficients a step, derived from the scheduler's own configuration.

Every deterministic few-step scheduler is, for fixed steps, the same three lines:

    prediction = denoiser(input_scale * x, timestep, context)
    x = sample * x + prediction_weight * prediction + noise_weight * fresh noise
    decoder_input = scale * x + shift

Nothing downstream (runtime, apps, verification) knows more about the scheduler than this table.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator


class SamplerStep(BaseModel):
    """One step: x <- sample * x + prediction * denoiser(input_scale * x, timestep) + noise * fresh normal noise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timestep: float
    input_scale: float = 1.0
    sample: float
    prediction: float
    noise: float = 0.0
    index: int = 0
    """Place of `timestep` in `SamplerConfig.timesteps`: what a denoiser specialised to them takes as `step`."""


def moment(step: SamplerStep, names: Collection[str]) -> dict[str, NDArray[np.generic]]:
    """What tells a denoiser with inputs `names` which step it is at: `timestep` [1] float32, `step` [1] int32, or
    nothing where the one timestep is folded in."""
    known: dict[str, NDArray[np.generic]] = {
        "timestep": np.array([step.timestep], dtype=np.float32),
        "step": np.array([step.index], dtype=np.int32),
    }
    return {name: value for name, value in known.items() if name in names}


class SamplerConfig(BaseModel):
    """A scheduler and the times at which a student was distilled.

    `times` maps a number of steps to where each step starts: sigmas in 0..1 for `flow_match_euler`, angles in 0..pi/2
    for `scm`, training timesteps for the others. A step ends where the next one starts; the last one at sigma or angle
    0, or at `final_alpha`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheduler: Literal["flow_match_euler", "ddim", "lcm", "euler_ancestral", "scm"]
    prediction_type: Literal["velocity", "epsilon", "sample", "v_prediction", "trigflow"]
    times: dict[int, tuple[float, ...]]
    default_steps: int
    num_train_timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    final_alpha: Literal["one", "first"] = "one"
    """Where the last VP step ends: alpha-bar 1 (x0 itself) or the schedule's first alpha-bar, as `set_alpha_to_one`
    says."""
    initial_scale: float = 1.0
    """Unit noise times this is what the first step starts from; Euler's schedules start below 1. Folded into that
    step."""

    @model_validator(mode="after")
    def _check(self) -> SamplerConfig:
        if self.default_steps not in self.times:
            raise ValueError(f"default_steps {self.default_steps} is not among the steps {sorted(self.times)}")
        for steps, times in self.times.items():
            if len(times) != steps:
                raise ValueError(f"{steps} steps need {steps} times, got {len(times)}")
            if any(a <= b for a, b in pairwise(times)):
                raise ValueError(f"times of {steps} steps must fall: {times}")
        if (self.scheduler == "flow_match_euler") != (self.prediction_type == "velocity"):
            raise ValueError("prediction_type velocity belongs to flow_match_euler and to it alone")
        if (self.scheduler == "scm") != (self.prediction_type == "trigflow"):
            raise ValueError("prediction_type trigflow belongs to scm and to it alone")
        return self

    def alpha_bars(self) -> list[float]:
        """Cumulative product of 1 - beta over the training timesteps (Ho et al. 2020; scaled_linear: Rombach et al.
        2022)."""
        n = self.num_train_timesteps
        product, bars = 1.0, []
        for i in range(n):
            ratio = i / (n - 1)
            if self.beta_schedule == "linear":
                beta = self.beta_start + ratio * (self.beta_end - self.beta_start)
            else:
                root = math.sqrt(self.beta_start) + ratio * (math.sqrt(self.beta_end) - math.sqrt(self.beta_start))
                beta = root * root
            product *= 1.0 - beta
            bars.append(product)
        return bars

    def table(self, steps: int) -> tuple[SamplerStep, ...]:
        """The folded schedule for `steps` steps; KeyError if the student was not distilled for them."""
        first, *rest = self._unscaled(self.times[steps])
        scale = self.initial_scale
        start = first.model_copy(update={"input_scale": scale * first.input_scale, "sample": scale * first.sample})
        known = self.timesteps()
        return tuple(step.model_copy(update={"index": known.index(step.timestep)}) for step in (start, *rest))

    def timesteps(self) -> tuple[float, ...]:
        """Every timestep that the denoiser is called with, for any number of steps; falling, each once."""
        called = {step.timestep for times in self.times.values() for step in self._unscaled(times)}
        return tuple(sorted(called, reverse=True))

    def _unscaled(self, times: tuple[float, ...]) -> tuple[SamplerStep, ...]:
        if self.scheduler == "flow_match_euler":
            ends = (*times[1:], 0.0)
            return tuple(
                SamplerStep(timestep=now * self.num_train_timesteps, sample=1.0, prediction=after - now)
                for now, after in zip(times, ends, strict=True)
            )
        if self.scheduler == "scm":
            return tuple(_trigflow_step(now, after) for now, after in zip(times, (*times[1:], 0.0), strict=True))
        bars = self.alpha_bars()
        last = 1.0 if self.final_alpha == "one" else bars[0]
        ends = (*(bars[int(t)] for t in times[1:]), last)
        return tuple(self._vp_step(t, bars[int(t)], after) for t, after in zip(times, ends, strict=True))

    def _vp_step(self, timestep: float, now: float, after: float) -> SamplerStep:
        """x0 and eps as linear functions of (x, prediction), then DDIM's eq. 12 (arXiv 2010.02502) with eta 0."""
        signal, sigma = math.sqrt(now), math.sqrt(1 - now)
        x0, eps = {
            "epsilon": ((1 / signal, -sigma / signal), (0.0, 1.0)),
            "sample": ((0.0, 1.0), (1 / sigma, -signal / sigma)),
            "v_prediction": ((signal, -sigma), (sigma, signal)),
        }[self.prediction_type]
        to_signal, to_sigma = math.sqrt(after), math.sqrt(1 - after)
        if self.scheduler == "lcm":
            # Consistency sampling (arXiv 2310.04378): jump to x0, then disturb it with fresh noise.
            return SamplerStep(
                timestep=timestep, sample=to_signal * x0[0], prediction=to_signal * x0[1], noise=to_sigma
            )
        fresh = 0.0
        if self.scheduler == "euler_ancestral":
            # Part of the noise at the end of the step is fresh (Karras et al. 2022, arXiv 2206.00364, algorithm 2, as
            # k-diffusion has it), in sigma / alpha, the units of Euler's schedule.
            start, end = (1 - now) / now, (1 - after) / after
            fresh = to_signal * math.sqrt(end * max(start - end, 0.0) / start)
            to_sigma = math.sqrt(max(to_sigma**2 - fresh**2, 0.0))
        return SamplerStep(
            timestep=timestep,
            sample=to_signal * x0[0] + to_sigma * eps[0],
            prediction=to_signal * x0[1] + to_sigma * eps[1],
            noise=fresh,
        )


def _trigflow_step(angle: float, after: float) -> SamplerStep:
    """SANA-Sprint's step (arXiv 2503.09641, section 3): a flow network asked at an angle of TrigFlow, x0, fresh noise.

    The network sees the point on its own straight path at time s, which is `size` times the point on the circle.
    """
    cosine, sine = math.cos(angle), math.sin(angle)
    time = sine / (cosine + sine)
    size = math.hypot(time, 1 - time)
    # On the circle the velocity is (1 - 2 s) x + size * prediction.
    return SamplerStep(
        timestep=time,
        input_scale=size,
        sample=math.cos(after) * (cosine - sine * (1 - 2 * time)),
        prediction=-math.cos(after) * sine * size,
        noise=math.sin(after),
    )
