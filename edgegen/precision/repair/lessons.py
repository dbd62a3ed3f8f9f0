"""What a quantized student learns from the float one, without data: prompts and noise in, the float one's answers out.

The trajectory is the quantized student's own, so that it meets the latents that it will meet when it draws; after each
step it is held to what the float student says there, to where the float trajectory is by then, and to how far another
prompt moves the answer. The encoder and the decoder are held to the float ones' outputs, and the encoder to what its
errors do to the denoiser. One call's activations are held at a time, a pair's of the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from edgegen.precision.budget import SCALES
from edgegen.precision.conditioning import pack
from edgegen.precision.pictures import Pictures, moved
from edgegen.precision.repair.straight_through import Changes
from edgegen.precision.sensitivity import Plans
from edgegen.precision.simulate import Changed, Drawing, Network, mean_square
from edgegen.students.sample import decoder_input, initial_noise, sampler_table

HEARD = SCALES["picture"] / SCALES["conditioning"]
"""What a relative error of the difference between two prompts counts, beside one of the answer itself."""
STRENGTH = 10.0
"""What a prompt's strength counts: the square of the share by which it moves the answer more or less. Squared errors
alone would have it moved less, as any uncertain answer."""
HARDLY = 0.006
"""Of the square of an answer: a prompt that moves it by less says little about hearing, and much about rounding. As
gates have it (`edgegen.verify.gates.least_heard`)."""
TINY = 1e-12


class Judged(NamedTuple):
    """`loss` as experiments have it: its decibels are PSNR of pictures, SQNR of calls. `heard` and `worst`: by what
    share another prompt's effect is another, the root of the mean square and the worst of all."""

    loss: float
    heard: float = 0.0
    worst: float = 0.0

    @property
    def score(self) -> float:
        """One number, less is better: as budgets weigh pictures and prompts, of which gates take the worst."""
        return self.loss / SCALES["picture"] + self.worst**2 / SCALES["conditioning"]

    def spoils(self, other: Judged) -> str:
        """What of `other` is better than here, in words; "" for nothing."""
        if not self.loss <= other.loss:
            return "held-back pictures are farther away"
        if not self.heard <= other.heard:
            return f"held-back prompts would be heard by {self.heard:.2%} otherwise, which is {other.heard:.2%} now"
        if not self.worst <= other.worst:
            return f"the worst held-back prompt would go from {other.worst:.2%} to {self.worst:.2%}"
        return ""


class Lessons(Protocol):
    """Something to learn from, and something else to be judged on."""

    def learn(self, index: int, changes: Changes) -> float:
        """Lesson `index`, the same whenever it is asked for: its loss, with gradients left in the tensors of `changes`
        that ask for them."""
        ...

    def judge(self, changes: Changes) -> Judged: ...


def relative(made: Tensor, wanted: Tensor, floor: Tensor | float = TINY) -> Tensor:
    """Squared error over squares."""
    return (made - wanted).square().sum() / (wanted.square().sum() + floor)


@dataclass(frozen=True)
class HeldBack(Pictures):
    """Pictures computed as `given` says, whatever plans they are asked about."""

    given: dict[str, Mapping[str, Changed]] = field(default_factory=dict)

    @torch.no_grad()
    def judge(self) -> Judged:
        """Every sample's prompt before every other sample's, at each step of the float picture: the worst of a few
        pairs is as much chance as it is the weights."""
        found = []
        for place, drawn in enumerate(self.floats):
            wanted = self._wanted[place]
            made = [self.drawing.answers(drawn, ids, self.given) for ids in self._asked(place)]
            for other, said in zip(wanted[1:], made[1:], strict=True):
                steps = zip(wanted[0], other, made[0], said, strict=True)
                found += [min(1.0, moved([[a], [b]], [[c], [d]])) for a, b, c, d in steps]
        mean = math.sqrt(sum(one**2 for one in found) / max(1, len(found)))
        return Judged(self.loss({}), mean, max(found, default=0.0))

    def _asked(self, place: int) -> list[Tensor]:
        """The prompt of a sample, then the one that it is held against and those of all others, once each."""
        sample = self.samples[place]
        asked = [sample.ids, sample.other_ids]
        for one in self.samples:
            if not any(one.ids.equal(known) for known in asked):
                asked.append(one.ids)
        return asked

    @cached_property
    def _wanted(self) -> list[list[tuple[Tensor, ...]]]:
        """Of each sample, the float denoiser's answers to what `_asked` says."""
        with torch.no_grad():
            return [
                [self._truth.answers(drawn, ids) for ids in self._asked(place)]
                for place, drawn in enumerate(self.floats)
            ]

    def _made(self, plans: Plans) -> dict[str, dict[str, Changed]]:
        return {name: dict(one) for name, one in self.given.items()}


@dataclass(frozen=True)
class Trajectories:
    """Lessons of a student that draws. `quantized` holds the graphs with earlier repairs, `floats` those without."""

    quantized: Drawing
    floats: Drawing
    ids: Sequence[Tensor]
    """What the encoder takes for the prompts to learn from, at least two; [1, ...] each."""
    held_back: HeldBack
    seed: int
    """Lesson i is drawn from `seed` + i."""

    def learn(self, index: int, changes: Changes) -> float:
        student, encoder = self.floats.student, self.floats.encoder
        assert student.config.sampler is not None
        counts = sorted(student.config.sampler.times)
        generator = torch.Generator().manual_seed(self.seed + index)
        first, second = torch.randperm(len(self.ids), generator=generator)[:2].tolist()
        steps = counts[index % len(counts)]
        pair = (self.ids[first], self.ids[second])
        with torch.no_grad():
            wanted = tuple(self.floats.encode(ids) for ids in pair)
        made = tuple(self._call(encoder, {self._input(encoder): ids}, changes) for ids in pair)
        leaves = tuple(one.detach().requires_grad_(one.requires_grad) for one in made)
        ready, total = self._steps(steps, self.seed + index, wanted, leaves, changes)
        if made[0].requires_grad:
            loss = sum((relative(a, b) for a, b in zip(made, wanted, strict=True)), torch.zeros(()))
            onward = sum(
                ((one * leaf.grad).sum() for one, leaf in zip(made, leaves, strict=True) if leaf.grad is not None),
                torch.zeros(()),
            )
            (loss + onward).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if changes.get("decoder"):
            given = {self._input("decoder"): ready}
            with torch.no_grad():
                image = self.floats.networks["decoder"](given)[0]
            loss = relative(self._call("decoder", given, changes), image)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def judge(self, changes: Changes) -> Judged:
        self.held_back.given.update(changes)
        return self.held_back.judge()

    def _steps(
        self, steps: int, seed: int, contexts: Sequence[Tensor], leaves: Sequence[Tensor], changes: Changes
    ) -> tuple[Tensor, float]:
        """What the decoder is given at the end of the float trajectory, and the loss on the way."""
        student, total = self.floats.student, 0.0
        denoiser = self.floats.networks["denoiser"]
        learning = bool(changes.get("denoiser")) or leaves[0].requires_grad
        exact = own = initial_noise(student, [seed])
        for index, step in enumerate(sampler_table(student, steps), start=1):
            fresh = step.noise * initial_noise(student, [seed], stream=index) if step.noise else torch.zeros(())
            with torch.no_grad():
                answer = denoiser(self.floats.denoiser_inputs(step, exact, contexts[0]))[0]
                exact = step.sample * exact + step.prediction * answer + fresh
                if not learning:
                    continue
                wanted = [denoiser(self.floats.denoiser_inputs(step, own, one))[0] for one in contexts]
            made = [self._call("denoiser", self.quantized.denoiser_inputs(step, own, one), changes) for one in leaves]
            after = step.sample * own + step.prediction * made[0] + fresh
            loss = relative(made[0], wanted[0]) + relative(made[1], wanted[1]) + relative(after, exact)
            loss = loss + _heard(made[0] - made[1], wanted[0] - wanted[1], HARDLY * wanted[0].square().sum())
            loss = loss / steps
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            own = after.detach()
        return decoder_input(student, exact), total

    def _call(self, name: str, inputs: Mapping[str, Tensor], changes: Changes) -> Tensor:
        return pack(self.quantized.networks[name](inputs, changes.get(name)))

    def _input(self, name: str) -> str:
        return self.quantized.networks[name].inputs[0]


def _heard(made: Tensor, wanted: Tensor, floor: Tensor) -> Tensor:
    """Of the differences that another prompt makes: their error, and that of their norm alone."""
    strength = ((made.square().sum() + floor) / (wanted.square().sum() + floor)).sqrt()
    return HEARD * relative(made, wanted, floor) + STRENGTH * (strength - 1.0).square()


@dataclass(frozen=True)
class Components:
    """Lessons of a student whose networks are called alone: noise of the size of each example input."""

    quantized: Mapping[str, Network]
    floats: Mapping[str, Network]
    examples: Mapping[str, Mapping[str, Tensor]]
    """Component -> its example inputs by name."""
    seed: int
    held_back: int
    """Calls that judge, of each component; the example is one of them."""

    def learn(self, index: int, changes: Changes) -> float:
        names = [name for name in self.examples if changes.get(name)]
        if not names:
            return 0.0
        name = names[index % len(names)]
        inputs = self._inputs(name, self.seed + index)
        with torch.no_grad():
            wanted = self.floats[name](inputs)
        made = self.quantized[name](inputs, changes[name])
        loss = torch.stack([relative(a, b) for a, b in zip(made, wanted, strict=True)]).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def judge(self, changes: Changes) -> Judged:
        found = []
        for name, inputs, wanted in self._judging:
            made = self.quantized[name](inputs, changes.get(name))
            errors = [a - b for a, b in zip(made, wanted, strict=True)]
            found.append(mean_square(errors) / max(TINY, mean_square(wanted)))
        return Judged(sum(found) / len(found))

    @cached_property
    def _judging(self) -> list[tuple[str, Mapping[str, Tensor], tuple[Tensor, ...]]]:
        with torch.no_grad():
            return [
                (name, inputs, self.floats[name](inputs))
                for name, example in self.examples.items()
                for inputs in (example, *(self._inputs(name, -1 - i) for i in range(self.held_back - 1)))
            ]

    def _inputs(self, name: str, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {key: _like(value, generator) for key, value in self.examples[name].items()}


def _like(example: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise with the mean and deviation of `example`; of whole numbers, and of one number alone, its own values
    in another order."""
    if not example.is_floating_point() or example.numel() == 1:
        return example.flatten()[torch.randperm(example.numel(), generator=generator)].reshape(example.shape)
    noise = torch.randn(example.shape, generator=generator)
    return noise * (example.float().std() or 1.0) + example.float().mean()
