"""What samples that nobody has measured may lose, from those that were: a margin by the laws of small samples.

A build judges a plan on prompts of its own, and takes the worst of them. Losses are about log-normal from prompt to
prompt (measured on `shapes`, 130 pairs of prompts each: the logarithm of how much a palette, a w8 and a w8a8 plan
change how prompts are heard has a spread of 0.84, 0.48 and 0.75 and a skewness of 0.1 to 0.3), so that the logarithm
of one more sample lies below mean + t s sqrt(1 + 1 / n) with the probability that Student's t is below: the prediction
interval of a normal distribution. `unseen` samples are below it together when each takes its part of what is left
(Bonferroni). On those 130 pairs, 32 of them bounded the worst of 4 others in 93 to 95 of 100 draws; their own worst
did in 89 to 90, and the worst of 6, which is what decided before, in 60.

Of few samples the spread itself is uncertain, and t wide: what was found before counts as `PRIOR` samples more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95
"""How often all unseen samples shall be within the bound."""
PRIOR = 8
"""Degrees of freedom that what is known of spreads beforehand counts as."""


def bounds(
    groups: Sequence[Sequence[float]],
    unseen: Sequence[int],
    least: float,
    known: float,
    confidence: float = CONFIDENCE,
) -> tuple[float, ...]:
    """Of each group of measured losses, what the worst of its `unseen` samples stays below with that `confidence`, all
    groups together; never less than the group's own worst.

    Spread is taken to be the same in all groups, each about its own mean, and `known` beforehand to be about that (of
    natural logarithms). Losses below `least` are rounding, and taken for it.
    """
    logs = [np.log(np.maximum(np.asarray(group, dtype=np.float64), least)) for group in groups]
    freedom = PRIOR + sum(len(group) - 1 for group in logs)
    squares = PRIOR * known**2 + sum(float(np.square(group - group.mean()).sum()) for group in logs)
    count = max(1, sum(unseen))
    factor = float(student.ppf(1.0 - (1.0 - confidence) / count, freedom)) * math.sqrt(squares / freedom)
    worst = tuple(max(group) for group in groups)
    made = []
    for group, top, number in zip(logs, worst, unseen, strict=True):
        high = float(group.mean()) + factor * math.sqrt(1.0 + 1.0 / len(group))
        made.append(top if top <= least or not number else max(top, math.exp(high)))
    return tuple(made)
