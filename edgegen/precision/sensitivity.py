"""What each op's precision does to the final picture, after all steps and the decoder, and to how prompts are heard.

To first order an error e of one op's output moves the picture by J e, where J is the rest of the network: the other
ops, the steps that follow, the decoder. The mean of (v J e)^2 over vectors v of random signs is |J e|^2 (Hutchinson's
estimator), and v J is a gradient: one backward pass gives it for every op at once, and every candidate precision is
then a dot product with the error that it makes, summed over the steps at which the op is called.

How a prompt is heard: the change, to first order too, of the norm of the difference between the denoiser's answers to
two prompts at the same latents, as a share of that norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.stats import spearmanr

from edgegen.precision.plan import OpPlan
from edgegen.precision.simulate import Network

Key = tuple[str, str]
"""Component and op."""
Options = Mapping[Key, tuple[OpPlan, ...]]


@dataclass(frozen=True)
class Effect:
    """Expected squared changes: of the picture, over the square of its peak; of the norm of what the prompt changes, as
    a share of it."""

    picture: float
    conditioning: float = 0.0


def estimate(
    experiment: Experiment, options: Options, done: Callable[[], None] = lambda: None
) -> dict[Key, tuple[Effect, ...]]:
    """The effect of each option alone, in order: the mean over the samples."""
    found = []
    for index in range(experiment.count):
        found.append(experiment.estimate(index, options))
        done()
    return average(found)


def average(found: Sequence[Mapping[Key, tuple[Effect, ...]]]) -> dict[Key, tuple[Effect, ...]]:
    """Of the effects on each of several samples."""

    def mean(effects: tuple[Effect, ...]) -> Effect:
        return Effect(
            sum(one.picture for one in effects) / len(effects), sum(one.conditioning for one in effects) / len(effects)
        )

    return {key: tuple(mean(one) for one in zip(*(each[key] for each in found), strict=True)) for key in found[0]}


Plans = Mapping[str, Mapping[str, OpPlan]]
"""Component -> op -> how it is computed; ops that are not named, and floats, stay as they are."""


class Experiment(Protocol):
    """A student and what it is tried on."""

    @property
    def networks(self) -> Mapping[str, Network]: ...

    @property
    def count(self) -> int:
        """Samples."""
        ...

    def estimate(self, index: int, options: Options) -> dict[Key, tuple[Effect, ...]]:
        """The effect of each option alone on one sample, to first order."""
        ...

    def loss(self, plans: Plans) -> float:
        """The mean of what these ops together do to the picture, measured."""
        ...


@dataclass(frozen=True)
class Confirmed:
    """Effects with what was measured in the place of what was estimated; `measured` are (estimate, measurement)."""

    effects: dict[Key, tuple[Effect, ...]]
    measured: dict[tuple[Key, int], tuple[float, float]]

    @classmethod
    def of(
        cls, estimates: Mapping[Key, tuple[Effect, ...]], measured: dict[tuple[Key, int], tuple[float, float]]
    ) -> Confirmed:
        """What was not measured is scaled by the median of measurement over estimate."""
        ratios = sorted(found / guess for guess, found in measured.values() if guess > 0)
        middle = ratios[len(ratios) // 2] if ratios else 1.0

        def known(key: Key, index: int, effect: Effect) -> Effect:
            found = measured.get((key, index))
            return Effect(effect.picture * middle if found is None else found[1], effect.conditioning)

        made = {key: tuple(known(key, i, one) for i, one in enumerate(found)) for key, found in estimates.items()}
        return cls(made, measured)

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, of estimates with measurements; None for fewer than three."""
        if len(self.measured) < 3:
            return None
        pairs = np.array(list(self.measured.values()), dtype=np.float64)
        return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def confirm(
    experiment: Experiment,
    options: Options,
    effects: Mapping[Key, tuple[Effect, ...]],
    top: int,
    spread: int,
    done: Callable[[], None] = lambda: None,
) -> Confirmed:
    """Measure the `top` options by their estimated effect, and `spread` more evenly over the ranks of the others."""
    ranked = sorted(
        ((key, index) for key, found in effects.items() for index in range(len(found))),
        key=lambda one: -effects[one[0]][one[1]].picture,
    )
    rest = ranked[top:]
    chosen = ranked[:top] + [rest[i * len(rest) // spread] for i in range(spread if rest else 0)]
    measured = {}
    for key, index in dict.fromkeys(chosen):
        found = experiment.loss({key[0]: {key[1]: options[key][index]}})
        measured[key, index] = (effects[key][index].picture, found)
        done()
    return Confirmed.of(effects, measured)
