"""A plan before the gates of a build: pictures and pairs of prompts as those have them, of other prompts and more.

A gate takes the worst picture, and the worst step of the worst pair, of a few prompts; which ones, a plan may not know.
So it is judged by what they would come to: the bound that such prompts stay within (`edgegen.precision.margin`), from
as many others as time allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from edgegen.precision.margin import bounds
from edgegen.precision.pictures import PEAK_SQUARED, TOLERANCE, Sample, moved
from edgegen.precision.plan import OpPlan
from edgegen.precision.simulate import Changes, Drawing, Drawn, mean_square
from edgegen.students.student import Student
from edgegen.verify.reference import MAX_PROMPTS

LEAST_LOSS, LEAST_CHANGE = 1e-12, 1e-5
"""What float32 arithmetic alone does to a picture, and to how a prompt is heard."""
SPREAD_LOSS, SPREAD_CHANGE = 0.4, 0.7
"""Of the natural logarithms of both, over the prompts of `shapes`: what is known before anything is measured."""
PICTURES, OTHERS = 0.25, 0.1
"""Of each pair of prompts, pictures that are drawn; and pictures of each other number of steps."""
FEWEST = 4
LOOKS = ((0.25, 1.5), (0.5, 1.25), (0.75, 1.1))
"""After these shares of the pairs a plan is given up whose bound is this many times what is allowed, as one is with any
pair that misses alone: of 8 pairs the mean of the logarithm is uncertain by 0.25. What is kept was measured on all of
them."""
MACS = 1e12
"""Multiply-accumulates that judging one plan may take: about 20 s on two cores. Larger students have fewer pairs."""
Plans = Mapping[str, Mapping[str, OpPlan]]


class Judged(NamedTuple):
    """Pictures: squared errors over the square of the peak, the mean of that number of steps which loses most;
    conditioning: by what share what a prompt moves is another, the worst that was measured. `_most`: what the worst of
    a build stays within, never less than the worst that was measured."""

    psnr_loss: float
    psnr_loss_most: float
    conditioning: float
    conditioning_most: float
    pairs: int
    """Pairs of prompts that were measured."""


@dataclass(frozen=True)
class Panel:
    """`pictures` are drawn; of `pairs` the denoiser's answers to both prompts are taken at each step of the first's
    float picture. `unseen_pictures`: number of steps -> pictures of them that a build judges; `unseen_pairs` likewise.
    """

    pictures: tuple[Sample, ...]
    pairs: tuple[Sample, ...]
    unseen_pictures: Mapping[int, int]
    unseen_pairs: int
    tolerance: float = TOLERANCE
    """Of how prompts are heard, as the gate will have it."""
    _floats: dict[tuple[int, int], tuple[Drawn, tuple[tuple[Tensor, ...], ...]]] = field(default_factory=dict)
    """(seed, steps) -> the float student's picture, and its answers to both prompts: the same for every plan."""

    def judged(self, truth: Drawing, drawing: Drawing, plans: Plans, allowed: float = math.inf) -> Judged:
        """`plans` computed on the graphs of `drawing`, against the float ones of `truth`.

        `allowed`: of how prompts are heard, the change above which a plan is not taken. Where that is plain from the
        first pairs the others are not measured (`LOOKS`).
        """
        changes = {name: drawing.networks[name].changes(ops) for name, ops in plans.items()}
        moved = self._heard(truth, drawing, changes, allowed)
        losses: dict[int, list[float]] = {}
        for sample in self.pictures:
            drawn = self._float(truth, sample)[0]
            known = drawn if truth is drawing else None
            made = drawing.draw(sample.ids, sample.seed, sample.steps, changes, known)
            losses.setdefault(sample.steps, []).append(mean_square([made.image - drawn.image]) / PEAK_SQUARED)
        unseen = [self.unseen_pictures.get(steps, 0) for steps in losses]
        most = bounds(list(losses.values()), unseen, LEAST_LOSS, SPREAD_LOSS)
        mean = max(sum(group) / len(group) for group in losses.values())
        return Judged(mean, max(most), max(moved), self._bound(moved), len(moved))

    def _heard(self, truth: Drawing, drawing: Drawing, changes: Changes, allowed: float) -> list[float]:
        looks = {max(FEWEST, int(share * len(self.pairs))): factor for share, factor in LOOKS}
        moved: list[float] = []
        for sample in self.pairs:
            moved.append(self._moved(truth, drawing, sample, changes))
            looked = looks.get(len(moved))
            if looked is not None and (max(moved) > allowed or self._bound(moved) > looked * allowed):
                break
        return moved

    def _bound(self, moved: Sequence[float]) -> float:
        return bounds([moved], [self.unseen_pairs], LEAST_CHANGE, SPREAD_CHANGE)[0]

    def _moved(self, truth: Drawing, drawing: Drawing, sample: Sample, changes: Changes) -> float:
        drawn, expected = self._float(truth, sample)
        found = [drawing.answers(drawn, ids, changes) for ids in (sample.ids, sample.other_ids)]
        return moved(expected, found, self.tolerance)

    def _float(self, truth: Drawing, sample: Sample) -> tuple[Drawn, tuple[tuple[Tensor, ...], ...]]:
        key = (sample.seed, sample.steps)
        if key not in self._floats:
            drawn = truth.draw(sample.ids, sample.seed, sample.steps)
            answers = tuple(truth.answers(drawn, ids) for ids in (sample.ids, sample.other_ids))
            self._floats[key] = (drawn, answers)
        return self._floats[key]


def panel(
    student: Student,
    ids: Tensor,
    steps: int,
    others: Sequence[int],
    macs: Mapping[str, int],
    seed: int,
    most: int,
    tolerance: float = TOLERANCE,
) -> Panel:
    """Of prompts [P, L] that nothing else is learned from: each before the next one, then before the one after that,
    until there are `most` pairs, or fewer of a large student. Sample i is drawn from the noise of `seed` + i.

    `steps` is the number that a build judges prompts at, `others` those that it draws one picture of; `macs` those of
    one call of each component.
    """
    denoiser, rest = macs.get("denoiser", 0), sum(number for name, number in macs.items() if name != "denoiser")
    drawing = rest + steps * denoiser
    pair = max(1, 2 * steps * denoiser + int(PICTURES * drawing))
    count = max(min(most, FEWEST), min(most, int(MACS // pair)))
    number = len(ids)
    pairs = tuple(
        Sample(ids[i % number][None], seed + i, ids[(i + 1 + i // number % max(1, number - 1)) % number][None], steps)
        for i in range(count)
    )
    few = max(min(2, count), int(OTHERS * count))
    pictures = pairs[: max(few, int(PICTURES * count))]
    pictures += tuple(Sample(one.ids, one.seed, one.other_ids, other) for other in others for one in pairs[:few])
    prompts = max(1, min(MAX_PROMPTS, len(student.config.example_prompts)))
    return Panel(pictures, pairs, {steps: prompts, **dict.fromkeys(others, 1)}, prompts, tolerance)
