"""One training that can be killed: AdamW, a cosine, averaged weights, and a state file that another process goes on
from.

What a step learns from is drawn from its number, so that a run that was killed and one that was not end with the same
bits on the same machine with the same threads.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgegen.errors import EdgegenError

BETAS = (0.9, 0.99)
DECAY = 0.01
"""Of weights, as AdamW has it; of matrices and kernels alone."""
WARM_UP = 0.03
"""Share of all steps in which the rate rises; from there on it falls."""
LAST = 0.01
"""What is left of the rate at the end."""
LONGEST = 1.0
"""Norm of the gradient beyond which it is scaled down."""
SAVED_EVERY = 60.0
"""Seconds between two writings of the state; judging writes it too."""


class Lessons(Protocol):
    """Something to learn from."""

    def learn(self, index: int) -> Tensor:
        """The loss of step `index`, differentiable in the weights that are trained."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What the next lesson depends on beside its index."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


class Judged(BaseModel):
    """Pictures of prompts that nothing is learned from. `psnr_db` against the teacher's; shares of prompts drawn right
    of the `shapes` student alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    psnr_db: float
    alignment: float | None = None

    def said(self) -> str:
        text = f"{self.psnr_db:.1f} dB to the teacher's pictures"
        return text if self.alignment is None else f"alignment {self.alignment:.3f}, {text}"


class Course(BaseModel):
    """What happened so far."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    step: int = 0
    loss: float = math.nan
    """Averaged over about the last fifty steps."""
    judged: list[tuple[int, Judged]] = []
    ended: str = ""
    """Why it ended before its last step."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all processes that worked at it, as both."""


class Shown(Protocol):
    """Where a long training is shown: a bar that moves, and a word beside it."""

    def advance(self) -> None: ...

    def status(self, text: str) -> None: ...


@dataclass
class Training:
    """One run over the parameters of `module` that ask for gradients."""

    module: nn.Module
    lessons: Lessons
    steps: int
    rate: float
    ema: float
    shown: Shown
    state: Path | None = None
    """None keeps nothing between processes."""
    judge: Callable[[], Judged] | None = None
    """Called with the averaged weights in `module`."""
    enough: Callable[[Judged], bool] = lambda _: False
    """Whether training may end."""
    judge_every: int = 250
    course: Course = field(default_factory=Course)

    def run(self) -> Course:
        """Train; `module` then holds the averaged weights."""
        parameters = {name: one for name, one in self.module.named_parameters() if one.requires_grad}
        optimiser = self._optimiser(parameters)
        average = {name: one.detach().clone() for name, one in parameters.items()}
        self._resume(parameters, optimiser, average)
        course, started = self.course, time.monotonic() - self.course.seconds
        worked = time.process_time() - course.cpu_seconds
        for _ in range(course.step):
            self.shown.advance()
        written, first, began = time.monotonic(), course.step, time.monotonic()
        while course.step < self.steps and not course.ended:
            loss = self._step(parameters, optimiser, average)
            course.loss = loss if math.isnan(course.loss) else course.loss + 0.02 * (loss - course.loss)
            self.shown.advance()
            left = (time.monotonic() - began) / (course.step - first) * (self.steps - course.step)
            self.shown.status(f"loss {course.loss:.4f}, {left:.0f} s left")
            judged = course.step % self.judge_every == 0 or course.step == self.steps
            if judged and self.judge is not None:
                self._compare(parameters, average)
            course.seconds, course.cpu_seconds = time.monotonic() - started, time.process_time() - worked
            if judged or time.monotonic() - written > SAVED_EVERY:
                self._write(parameters, optimiser, average)
                written = time.monotonic()
        with torch.no_grad():
            for name, one in parameters.items():
                one.copy_(average[name])
        return course

    def _optimiser(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        matrices = [one for one in parameters.values() if one.ndim > 1]
        vectors = [one for one in parameters.values() if one.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW([one for one in groups if one["params"]], lr=self.rate, betas=BETAS)

    def _step(
        self, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, average: Mapping[str, Tensor]
    ) -> float:
        course = self.course
        for group in optimiser.param_groups:
            group["lr"] = self.rate * share(course.step, self.steps)
        loss = self.lessons.learn(course.step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters.values(), LONGEST)
        if not (torch.isfinite(norm) and torch.isfinite(loss)):
            raise EdgegenError(
                f"healing went astray: the loss is not finite at step {course.step + 1}",
                hint="heal at a lower rate, as `--heal-rate 2e-4`",
            )
        optimiser.step()
        course.step += 1
        decay = min(self.ema, course.step / (course.step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
        return float(loss.detach())

    def _compare(self, parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor]) -> None:
        assert self.judge is not None
        live = {name: one.detach().clone() for name, one in parameters.items()}
        with torch.no_grad():
            for name, one in parameters.items():
                one.copy_(average[name])
            found = self.judge()
            for name, one in parameters.items():
                one.copy_(live[name])
        self.course.judged.append((self.course.step, found))
        if self.course.step < self.steps and self.enough(found):
            self.course.ended = f"good enough after {self.course.step} steps: {found.said()}"

    def _write(
        self, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, average: Mapping[str, Tensor]
    ) -> None:
        """The whole state, in place of the last one or not at all."""
        if self.state is None:
            return
        held = {f"lessons/{name}": value for name, value in self.lessons.state().items()}
        for name, one in parameters.items():
            held |= {f"now/{name}": one.detach(), f"average/{name}": average[name]}
            # A weight that nothing reads any more, as of a norm before a removed block, has no moments.
            held |= {f"{key}/{name}": value for key, value in optimiser.state.get(one, {}).items()}
        beside = self.state.with_suffix(".tmp")
        about = {"course": self.course.model_dump_json(), "steps": json.dumps(self.steps)}
        save_file({name: value.contiguous().cpu() for name, value in held.items()}, beside, about)
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        beside.replace(self.state)

    def _resume(
        self, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, average: Mapping[str, Tensor]
    ) -> None:
        """What an earlier process came to, where there is anything."""
        if self.state is None or not self.state.is_file():
            return
        try:
            with safe_open(self.state, "pt") as held:
                self.course = Course.model_validate_json(held.metadata()["course"])
                names = set(held.keys())
                with torch.no_grad():
                    for name, one in parameters.items():
                        one.copy_(held.get_tensor(f"now/{name}"))
                        average[name].copy_(held.get_tensor(f"average/{name}"))
                        if f"step/{name}" in names:
                            # In the layout of the weight: the sums of the next step then go the same way.
                            optimiser.state[one] = {
                                "step": held.get_tensor(f"step/{name}"),
                                **{
                                    key: torch.empty_like(one).copy_(held.get_tensor(f"{key}/{name}"))
                                    for key in ("exp_avg", "exp_avg_sq")
                                },
                            }
                prefix = "lessons/"
                mine = [name for name in names if name.startswith(prefix)]
                self.lessons.restore({name.removeprefix(prefix): held.get_tensor(name) for name in mine})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise EdgegenError(
                f"what an earlier run left of its healing cannot be read: {error}", hint="`edgegen cache clean`"
            ) from error


def share(index: int, steps: int) -> float:
    """Of the rate, at a step: a short rise, then a cosine down to `LAST`."""
    warm = max(1, round(WARM_UP * steps))
    if index < warm:
        return (index + 1) / warm
    return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * (index - warm + 1) / max(1, steps - warm)))
