"""A student of networks that are called alone, without a sampler: what an op does to its network's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from edgegen.precision.sensitivity import Effect, Key, Options, Plans
from edgegen.precision.simulate import Network, mean_square
from edgegen.precision.taps import Dots, changes, gradients, tapped


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
    def floats(self) -> tuple[tuple[Tensor, ...], ...]:
        with torch.no_grad():
            return tuple(self.networks[name](inputs) for name, inputs in self.samples)

    def estimate(self, index: int, options: Options) -> dict[Key, tuple[Effect, ...]]:
        name, inputs = self.samples[index]
        generator = torch.Generator().manual_seed(index)
        output, taps = tapped(self.networks[name], inputs, changes(self.networks, options)[name])
        scale = 1.0 / math.sqrt(output.numel() * mean_square([output.detach()]))
        dots = Dots(options, self.projections)
        for k in range(self.projections):
            signs = torch.randint(0, 2, output.shape, generator=generator).float() * 2 - 1
            dots.add(taps, gradients(output, [tap.value for tap in taps], signs * scale, k + 1 < self.projections), k)
        return {key: tuple(Effect(float(one)) for one in sums.square().mean(1)) for key, sums in dots.sums.items()}

    @torch.no_grad()
    def loss(self, plans: Plans) -> float:
        found = []
        for (name, inputs), expected in zip(self.samples, self.floats, strict=True):
            network = self.networks[name]
            made = network(inputs, network.changes(plans.get(name, {})))
            errors = [a - b for a, b in zip(made, expected, strict=True)]
            found.append(mean_square(errors) / mean_square(expected))
        return sum(found) / len(found)

    def worst(self, plans: Plans) -> float:
        return self.loss(plans)

    def conditioning(self, plans: Plans) -> float:
        """Nothing is prompted here."""
        return 0.0
