"""A student of networks that are called alone, without a sampler: what an op does to its network's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from edgegen.graph.count import count
from edgegen.precision.resume import FloatRun
from edgegen.precision.sensitivity import Effect, Key, Options, Plans
from edgegen.precision.simulate import Network, mean_square
from edgegen.precision.taps import Tap, changes, gradients, tapped

BACKWARD_MACS = 2e11
"""Multiply-accumulates of the network for which random vectors are backpropagated, at least one: about 6 s."""


@dataclass(frozen=True)
class Calls:
    """The experiment (`edgegen.precision.sensitivity.Experiment`) of a `single` student: losses are noise over signal,
    so that their decibels are SQNR. A sample is one component's inputs by name."""

    networks: Mapping[str, Network]
    samples: tuple[tuple[str, Mapping[str, Tensor]], ...]
    projections: int = 6

    @property
    def count(self) -> int:
        return len(self.samples)

    @cached_property
    def runs(self) -> tuple[FloatRun, ...]:
        """The float network on each sample."""
        return tuple(FloatRun.of(self.networks[name], inputs) for name, inputs in self.samples)

    def estimate(self, index: int, options: Options) -> dict[Key, tuple[Effect, ...]]:
        """As `edgegen.precision.pictures` has it, but for two things that make one or two backward passes enough for a
        network that takes seconds: what errors of different rows (output channels of a convolution, tokens of a linear)
        do is taken to be unrelated, so that every row is a sample of its own; and the larger the network, the fewer
        random vectors are sent back."""
        name, inputs = self.samples[index]
        network = self.networks[name]
        projections = max(1, min(self.projections, int(BACKWARD_MACS // max(1, count(network.program).macs))))
        generator = torch.Generator().manual_seed(index)
        output, taps = tapped(network, inputs, changes(self.networks, options)[name])
        scale = 1.0 / math.sqrt(output.numel() * mean_square([output.detach()]))
        sums = {key: torch.zeros(len(made), dtype=torch.float64) for key, made in options.items()}
        for k in range(projections):
            signs = torch.randint(0, 2, output.shape, generator=generator).float() * 2 - 1
            found = gradients(output, [tap.value for tap in taps], signs * scale, k + 1 < projections)
            for tap, gradient in zip(taps, found, strict=True):
                if gradient is not None:
                    sums[tap.key] += _by_row(tap, gradient) / projections
        return {key: tuple(Effect(float(one)) for one in made) for key, made in sums.items()}

    @torch.no_grad()
    def loss(self, plans: Plans) -> float:
        found = []
        for (name, _), run in zip(self.samples, self.runs, strict=True):
            made = run.changed(self.networks[name].changes(plans.get(name, {})))
            errors = [a - b for a, b in zip(made, run.outputs, strict=True)]
            found.append(mean_square(errors) / mean_square(run.outputs))
        return sum(found) / len(found)

    def worst(self, plans: Plans) -> float:
        return self.loss(plans)

    def conditioning(self, plans: Plans) -> float:
        """Nothing is prompted here."""
        return 0.0


def _by_row(tap: Tap, gradient: Tensor) -> Tensor:
    """Of each error of `tap`, the sum of the squares of its rows' products with `gradient`; float64."""
    rows = math.prod(gradient.shape[:2])
    errors = tap.errors.reshape(len(tap.errors), rows, -1)
    dots: Tensor = torch.linalg.vecdot(errors, gradient.reshape(rows, -1))
    return dots.double().square().sum(-1)
