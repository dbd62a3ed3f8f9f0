"""A student that draws tried on prompts: its pictures, and how it hears what it is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgegen.precision.sensitivity import Effect, Key, Options, Plans
from edgegen.precision.simulate import Changed, Drawing, Drawn, Network, mean_square
from edgegen.precision.taps import Dots, Tap, changes, gradients, tapped
from edgegen.students.sampler import SamplerStep
from edgegen.verify.gates import default_gates, heard
from edgegen.verify.metrics import DEGENERATE_BELOW, sensitivity

if TYPE_CHECKING:
    from edgegen.precision.panel import Judged, Panel

PEAK_SQUARED = 4.0
"""Of pictures in -1..1: a loss is a mean squared error over this, so that its decibels are PSNR."""

TOLERANCE = 0.05
"""Of how prompts are heard, where a plan is asked for nothing else."""


@dataclass(frozen=True)
class Sample:
    """A prompt, its noise, another prompt to hold it against, and in how many steps it is drawn."""

    ids: Tensor
    seed: int
    other_ids: Tensor
    steps: int


@dataclass(frozen=True)
class Pictures:
    """The experiment (`edgegen.precision.sensitivity.Experiment`) of a student that draws."""

    drawing: Drawing
    samples: tuple[Sample, ...]
    projections: int = 6
    """Random vectors a sample."""
    truth: Drawing | None = None
    """What pictures are held against, where that is not `drawing` in float: its graphs before repairs."""
    panel: Panel | None = None
    """What a whole plan is judged by."""

    @property
    def networks(self) -> Mapping[str, Network]:
        return self.drawing.networks

    @property
    def count(self) -> int:
        return len(self.samples)

    @cached_property
    def floats(self) -> tuple[Drawn, ...]:
        """The float student's picture of each sample."""
        return tuple(self._truth.draw(one.ids, one.seed, one.steps) for one in self.samples)

    @property
    def _truth(self) -> Drawing:
        return self.truth or self.drawing

    def estimate(self, index: int, options: Options) -> dict[Key, tuple[Effect, ...]]:
        """Steps are gone through backwards, each computed again: one call's activations are held at a time."""
        backward = _Backward(self, index, options)
        picture, heard = backward.picture.sums, backward.heard.sums
        return {
            key: tuple(
                Effect(float(p), float(h))
                for p, h in zip(picture[key].square().mean(1), heard[key][:, 0].square(), strict=True)
            )
            for key in options
        }

    def loss(self, plans: Plans) -> float:
        return sum(self._losses(plans)) / self.count

    def judged(self, plans: Plans, allowed: float = math.inf) -> Judged:
        """These ops together before the panel; `allowed` as there."""
        assert self.panel is not None
        return self.panel.judged(self._truth, self.drawing, plans, allowed)

    def worst(self, plans: Plans) -> float:
        """The loss of the pictures of that number of steps which loses most."""
        found: dict[int, list[float]] = {}
        for sample, loss in zip(self.samples, self._losses(plans), strict=True):
            found.setdefault(sample.steps, []).append(loss)
        return max(sum(one) / len(one) for one in found.values())

    def _losses(self, plans: Plans) -> list[float]:
        made = self._made(plans)
        return [
            mean_square([self.drawing.draw(one.ids, one.seed, one.steps, made, drawn).image - drawn.image])
            / PEAK_SQUARED
            for one, drawn in zip(self.samples, self.floats, strict=True)
        ]

    def conditioning(self, plans: Plans) -> float:
        """By how much, as a share, these ops change the norm or the direction of what another prompt changes: the
        worst step of the worst sample, at the latents of the float picture, as gates measure it."""
        made = self._made(plans)
        return max(
            moved(
                [self._truth.answers(drawn, ids) for ids in (sample.ids, sample.other_ids)],
                [self.drawing.answers(drawn, ids, made) for ids in (sample.ids, sample.other_ids)],
            )
            for sample, drawn in zip(self.samples, self.floats, strict=True)
        )

    def _made(self, plans: Plans) -> dict[str, dict[str, Changed]]:
        return {name: self.networks[name].changes(ops) for name, ops in plans.items()}


def moved(
    expected: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]], tolerance: float = TOLERANCE
) -> float:
    """By how much, as a share, the norm or the direction of what another prompt changes is another: the worst step, as
    gates that allow `tolerance` measure it. `expected`, `found`: the denoiser's answers at every step to one prompt,
    and to the other."""
    sqnr_gate = default_gates().sqnr_db["plan"]
    worst = 0.0
    for answers in zip(*expected, *found, strict=True):
        step = sensitivity(*(one.numpy() for one in answers))
        if not step.degenerate:
            change = heard(step, tolerance, sqnr_gate)
            worst = max(worst, 1.0 if change is None else change)
    return worst


class _Backward:
    """Dots of one sample with random functionals of the picture, and with that of how it hears its prompt."""

    def __init__(self, pictures: Pictures, index: int, options: Options) -> None:
        self._drawing, self._sample, self._drawn = pictures.drawing, pictures.samples[index], pictures.floats[index]
        self._changed = changes(pictures.networks, options)
        self._count = pictures.projections
        self.picture, self.heard = Dots(options, self._count), Dots(options, 1)
        generator = torch.Generator().manual_seed(index)
        toward = self._decoder(generator)
        self._contexts = [torch.zeros_like(self._drawn.context) for _ in range(self._count + 1)]
        self._away = torch.zeros_like(self._drawn.context)
        """Gradients at the context: of each functional, then of how the prompt is heard; and at the other prompt's."""
        other = self._drawing.encode(self._sample.other_ids)
        for step, x in reversed(list(zip(self._drawn.table, self._drawn.latents, strict=True))):
            toward = self._step(step, x, other, toward)
        if self._changed[self._drawing.encoder]:
            self._encoder()

    def _decoder(self, generator: torch.Generator) -> list[Tensor]:
        """What each functional is of the last latent."""
        latent, decoder = self._drawing.student.config.latent, self._drawing.networks["decoder"]
        assert latent is not None
        ready = self._drawn.decoder_input.clone().requires_grad_()
        image, taps = tapped(decoder, {decoder.inputs[0]: ready}, self._changed["decoder"])
        scale = 1.0 / math.sqrt(image.numel() * PEAK_SQUARED)
        toward = []
        for k in range(self._count):
            signs = torch.randint(0, 2, image.shape, generator=generator).float() * 2 - 1
            *found, at_input = gradients(image, [*_values(taps), ready], signs * scale, k + 1 < self._count)
            self.picture.add(taps, found, k)
            assert at_input is not None
            toward.append(latent.scale * at_input)
        return toward

    def _step(self, step: SamplerStep, x: Tensor, other: Tensor, toward: list[Tensor]) -> list[Tensor]:
        """What each functional is of the latent before `step`, from what it is of the one after."""
        denoiser = self._drawing.networks["denoiser"]
        x, context = x.clone().requires_grad_(), self._drawn.context.clone().requires_grad_()
        answer, taps = tapped(denoiser, self._drawing.denoiser_inputs(step, x, context), self._changed["denoiser"])
        leaves = [*_values(taps), x, context]
        before = []
        for k in range(self._count):
            *found, at_latent, at_context = gradients(answer, leaves, step.prediction * toward[k], True)
            self.picture.add(taps, found, k)
            before.append(step.sample * toward[k] + (0.0 if at_latent is None else at_latent))
            self._contexts[k] += 0.0 if at_context is None else at_context
        x = x.detach()
        wanted = self._towards_hearing(step, x, answer.detach(), other)
        if wanted is None:
            return before
        *found, _, at_context = gradients(answer, leaves, wanted, False)
        self.heard.add(taps, found, 0)
        self._contexts[-1] += 0.0 if at_context is None else at_context
        del taps, leaves, answer
        away = other.clone().requires_grad_()
        answer, taps = tapped(denoiser, self._drawing.denoiser_inputs(step, x, away), self._changed["denoiser"])
        *found, at_context = gradients(answer, [*_values(taps), away], -wanted, False)
        self.heard.add(taps, found, 0)
        self._away += 0.0 if at_context is None else at_context
        return before

    def _encoder(self) -> None:
        encoder = self._drawing.networks[self._drawing.encoder]
        for ids, wanted in ((self._sample.ids, self._contexts), (self._sample.other_ids, [self._away])):
            context, taps = tapped(encoder, {encoder.inputs[0]: ids}, self._changed[self._drawing.encoder])
            for k, toward in enumerate(wanted, start=1):
                found = gradients(context, _values(taps), toward, k < len(wanted))
                if k == len(wanted):
                    self.heard.add(taps, found, 0)
                else:
                    self.picture.add(taps, found, k - 1)

    @torch.no_grad()
    def _towards_hearing(self, step: SamplerStep, latent: Tensor, answer: Tensor, other: Tensor) -> Tensor | None:
        """Gradient of log |answer to one prompt - answer to the other|, a step's share of it; None for a deaf
        denoiser."""
        (said,) = self._drawing.networks["denoiser"](self._drawing.denoiser_inputs(step, latent, other))
        difference = answer - said
        if float(difference.std()) <= DEGENERATE_BELOW * float(answer.std()):
            return None
        return difference / difference.square().sum() / len(self._drawn.latents)


def _values(taps: Sequence[Tap]) -> list[Tensor]:
    return [tap.value for tap in taps]
