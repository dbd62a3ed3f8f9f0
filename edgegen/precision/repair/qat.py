"""Quantization-aware distillation without data: quantized weights trained to answer as the float student does.

Adam (arXiv 1412.6980) on what is behind the codes (`straight_through`), steps as large a share of each weight's own
size as a cosine leaves of `RATE`. Every few steps the student is judged on prompts that it does not learn from; what
was best there is what stays, and training ends early where nothing gets better any more: best is what hears the worst
of those prompts best, among what spoils neither pictures nor prompts. The state is written there too, so that a run
that was killed goes on and ends with the same bits.

Every second step is a lesson that went worst so far, once more (online hard example mining, arXiv 1604.03540): a
network of few bits is at most prompts far better after a dozen steps, and at one step of one pair in thirty much worse,
where half a picture leaves open what another prompt makes of it. Means do not show that, gates do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgegen.errors import EdgegenError
from edgegen.precision.repair.lessons import Judged, Lessons
from edgegen.precision.repair.straight_through import Trainable

RATE = 5e-4
"""The longest step of a weight, as a share of the root of its tensor's mean square."""
BETAS = (0.9, 0.99)
WARM_UP = 0.05
"""Share of all steps in which the rate rises; from there on it falls."""
LAST = 0.02
"""What is left of the rate at the end."""
JUDGED_EVERY = 20
"""Steps; of short runs a fifth."""
SETTLED_EVERY = 4
"""Steps after which codes and scales follow the weights behind them."""
PATIENCE = 5
"""Judgements in a row without a better one, after which training ends."""


HARDEST = 16
"""Lessons that are remembered as those that went worst."""
RESTING = 4
"""Steps of that kind in which a lesson that was repeated is not repeated again."""


class Course(BaseModel):
    """What happened so far."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    step: int = 0
    before: tuple[float, float, float] = (math.inf, 0.0, 0.0)
    """As judged before the first step: `Judged`."""
    best: tuple[float, float, float] = (math.inf, 0.0, 0.0)
    best_step: int = 0
    since: int = 0
    """Judgements since the best."""
    losses: list[float] = []
    """Of the lessons, a mean between judgements."""
    judged: list[tuple[int, float, float, float]] = []
    """Step, then `Judged`."""
    hard: list[tuple[float, int]] = []
    """Loss and number of the lessons that went worst, the worst first."""
    rested: list[int] = []
    """Those that were repeated last."""
    ended: str = ""
    """Why it ended before its last step."""


@dataclass
class Training:
    """One run. `state` None keeps nothing between processes. `tick` is called after every step that is taken."""

    trainable: Trainable
    lessons: Lessons
    steps: int
    state: Path | None = None
    tick: Callable[[], None] = lambda: None

    def run(self) -> Course:
        """Train; `trainable` then holds the weights that were judged best, those that it came with among them."""
        parameters = self.trainable.parameters()
        rates = self.trainable.rates()
        groups = [{"params": [value], "lr": RATE * rates[name], "name": name} for name, value in parameters.items()]
        optimiser = torch.optim.Adam(groups, betas=BETAS)
        best = {name: value.clone() for name, value in parameters.items()}
        course = self._resumed(optimiser, best)
        if course is None:
            course = Course()
            found = self._judge()
            course.before = course.best = (found.loss, found.heard, found.worst)
            course.judged.append((0, *course.before))
        for _ in range(course.step):
            self.tick()
        every = max(1, min(JUDGED_EVERY, self.steps // 5))
        losses: list[float] = []
        while course.step < self.steps and not course.ended:
            problem = self._step(course, optimiser, losses)
            if problem:
                course.ended = f"{problem} at step {course.step + 1}"
                break
            course.step += 1
            self.tick()
            if course.step % every == 0 or course.step == self.steps:
                course.losses.append(sum(losses) / max(1, len(losses)))
                losses.clear()
                self._compare(course, best)
                self._write(optimiser, best, course)
        for name, value in parameters.items():
            value.copy_(best[name])
        self.trainable.settle()
        return course

    def _step(self, course: Course, optimiser: torch.optim.Optimizer, losses: list[float]) -> str:
        """One step; what is wrong with it, where nothing was changed."""
        index = course.step
        if index % SETTLED_EVERY == 0:
            self.trainable.settle()
        lesson = _lesson(course)
        loss = self.lessons.learn(lesson, self.trainable.changes(training=True))
        self.trainable.collect()
        if not math.isfinite(loss):
            return "the loss is not finite"
        if any(value.grad is not None and not value.grad.isfinite().all() for _, value in self._named(optimiser)):
            return "a gradient is not finite"
        share = _share(index, self.steps)
        for group in optimiser.param_groups:
            group["lr"] = RATE * share * group.setdefault("size", group["lr"] / RATE)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if any(not value.isfinite().all() for _, value in self._named(optimiser)):
            return "a weight is not finite"
        if lesson == index:  # what is repeated says nothing about the others
            losses.append(loss)
        others = [one for one in course.hard if one[1] != lesson]
        course.hard = sorted([*others, (loss, lesson)], reverse=True)[:HARDEST]
        return ""

    def _compare(self, course: Course, best: Mapping[str, Tensor]) -> None:
        found = self._judge()
        course.judged.append((course.step, *found))
        if not all(math.isfinite(one) for one in found):
            course.ended = f"the judged pictures are not finite at step {course.step}"
        elif found.score < Judged(*course.best).score and not found.spoils(Judged(*course.before)):
            course.best = (found.loss, found.heard, found.worst)
            course.best_step, course.since = course.step, 0
            for name, value in self.trainable.parameters().items():
                best[name].copy_(value)
        else:
            course.since += 1
            if course.since >= PATIENCE and course.step < self.steps:
                course.ended = f"held-back prompts gained nothing since step {course.best_step}"

    def _judge(self) -> Judged:
        self.trainable.settle()
        return self.lessons.judge(self.trainable.changes())

    @staticmethod
    def _named(optimiser: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        return [(group["name"], group["params"][0]) for group in optimiser.param_groups]

    def _write(self, optimiser: torch.optim.Optimizer, best: Mapping[str, Tensor], course: Course) -> None:
        """The whole state, in place of the last one or not at all."""
        if self.state is None:
            return
        held = {f"best/{name}": value for name, value in best.items()}
        for name, value in self._named(optimiser):
            moments = optimiser.state[value]
            held |= {f"now/{name}": value, f"mean/{name}": moments["exp_avg"], f"square/{name}": moments["exp_avg_sq"]}
        beside = self.state.with_suffix(".tmp")
        save_file(
            {name: value.contiguous() for name, value in held.items()}, beside, {"course": course.model_dump_json()}
        )
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        beside.replace(self.state)

    def _resumed(self, optimiser: torch.optim.Optimizer, best: Mapping[str, Tensor]) -> Course | None:
        """What an earlier process came to; None where there is nothing, or nothing of use."""
        if self.state is None or not self.state.is_file():
            return None
        try:
            with safe_open(self.state, "pt") as held:
                course = Course.model_validate_json(held.metadata()["course"])
                names = set(held.keys())
                if names != {f"{part}/{name}" for name in best for part in ("best", "now", "mean", "square")}:
                    return None
                for name, value in self._named(optimiser):
                    value.copy_(held.get_tensor(f"now/{name}"))
                    best[name].copy_(held.get_tensor(f"best/{name}"))
                    optimiser.state[value] = {
                        "step": torch.tensor(float(course.step)),
                        "exp_avg": held.get_tensor(f"mean/{name}"),
                        "exp_avg_sq": held.get_tensor(f"square/{name}"),
                    }
            self.trainable.settle()
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise EdgegenError(
                f"what an earlier run left of its training cannot be read: {error}", hint="`edgegen cache clean`"
            ) from error
        return course


def _lesson(course: Course) -> int:
    """Of the next step: a new one, or every second time the one that went worst of those that had their rest."""
    ready = [index for _, index in course.hard if index not in course.rested]
    if course.step % 2 == 0 or not ready:
        return course.step
    course.rested = [*course.rested, ready[0]][-RESTING:]
    return ready[0]


def _share(index: int, steps: int) -> float:
    """Of the rate, at a step."""
    warm = max(1, round(WARM_UP * steps))
    if index < warm:
        return (index + 1) / warm
    return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * (index - warm + 1) / max(1, steps - warm)))
