"""Times of a distillation that no scheduler's file says: DMD2's 999, 749, 499, 249, one step from 800 or from 400.

Their authors give them to the pipeline at every call (`pipeline(..., timesteps=[999, 749, 499, 249])`), so a folder's
`scheduler_config.json` says other ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from edgegen.errors import UsageError
from edgegen.students.sampler import SamplerConfig
from edgegen.students.student import Student

EXAMPLE = "as `--timesteps 999,749,499,249`"
MAX_STEPS = 64
LCM_LOWEST = 50
"""Below it the share of its input that LCM's boundary condition keeps is no longer nothing in float32."""


def parse_timesteps(text: str) -> tuple[float, ...]:
    """`999,749,499,249` of the command line; UsageError for what are no falling numbers."""
    try:
        times = tuple(float(one) for one in text.split(","))
    except ValueError as error:
        raise UsageError(f"`{text}` is not a list of timesteps", hint=f"give falling numbers, {EXAMPLE}") from error
    if not all(math.isfinite(one) for one in times) or any(a <= b for a, b in pairwise(times)):
        raise UsageError(f"timesteps `{text}` do not fall", hint=f"give falling numbers, {EXAMPLE}")
    if len(times) > MAX_STEPS:
        raise UsageError(f"`{text[:40]}...` is {len(times)} steps, more than {MAX_STEPS}", hint=f"give few, {EXAMPLE}")
    return times


def with_timesteps(student: Student, rows: Sequence[tuple[float, ...]]) -> Student:
    """`student` sampled at `rows` instead of its scheduler's own times; each row is one number of steps, the first the
    default.

    A row is what the denoiser is told at each step: training timesteps, for a flow 1000 times sigma, after any shift.
    UsageError for a student that is not sampled and for times that its scheduler has not.
    """
    sampler = student.config.sampler
    if sampler is None:
        raise UsageError(
            f"student `{student.config.name}` is called once: it has no timesteps", "leave `--timesteps` out"
        )
    if sampler.scheduler == "scm":
        raise UsageError("SCM steps along angles and not along timesteps", hint="leave `--timesteps` out")
    counts = [len(row) for row in rows]
    if len(set(counts)) != len(counts):
        raise UsageError(
            f"two lists of {next(n for n in counts if counts.count(n) > 1)} timesteps", hint="give one a count of steps"
        )
    times = {len(row): tuple(_time(sampler, one) for one in row) for row in rows}
    changed = sampler.model_copy(update={"times": times, "default_steps": counts[0]})
    if sampler.initial_scale != 1.0:
        # Euler's start is noise of the first step's own sigma, and the table has one for all counts.
        starts = {row[0] for row in times.values()}
        if len(starts) != 1:
            raise UsageError(
                f"lists of timesteps begin at {sorted(starts)}, and this scheduler has one start for all of them",
                hint="build one bundle a list",
            )
        start = sampler.alpha_bars()[int(starts.pop())]
        changed = changed.model_copy(update={"initial_scale": math.sqrt(1 - start)})
    return replace(student, config=student.config.model_copy(update={"sampler": changed}))


def _time(sampler: SamplerConfig, told: float) -> float:
    """What the table keeps of a timestep: a sigma for a flow, else the timestep itself."""
    last = sampler.num_train_timesteps
    if sampler.scheduler == "flow_match_euler":
        if not 0 < told <= last:
            raise UsageError(f"timestep {told:g} is not in 0..{last}", hint=f"give the times of a flow in 1..{last}")
        return told / last
    lowest = LCM_LOWEST if sampler.scheduler == "lcm" else 0
    if not (told.is_integer() and lowest <= told < last):
        raise UsageError(
            f"timestep {told:g} is not a whole number in {lowest}..{last - 1}, as `{sampler.scheduler}` has them",
            hint=f"give the times that the student was distilled for, {EXAMPLE}",
        )
    return told
