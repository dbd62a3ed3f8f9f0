"""What a pruned network learns from the one that it was cut out of, without data: prompts and noise in, the teacher's
answers out.

A denoiser walks: every row of a batch is a prompt and a latent on its way from noise to a picture, at one of the step
counts that the student serves. At each place the pruned network is asked what the teacher answers there; then half of
the rows go on by the teacher's answer and half by the pruned network's own, so that it meets the latents that its own
errors lead to. A decoder is given what the teacher's denoiser draws, a little disturbed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgegen.prune.features import Tap, Watch, difference
from edgegen.students.sample import condition, decoder_input, sampler_table
from edgegen.students.sampler import SamplerStep
from edgegen.students.student import Component, Student

DISTURBED = 0.05
"""Deviation of what is added to a decoder's latents, as a share of theirs: a pruned denoiser errs."""
POOL = 1024
"""Latents that a decoder learns from, at most."""
POOL_MACS = 1e13
"""Multiply-accumulates that drawing them may take."""


@dataclass(frozen=True)
class Arithmetic:
    """Where and how the networks are computed."""

    device: torch.device
    half: bool
    """bfloat16 under autocast; weights, losses and optimiser stay fp32."""

    def __call__(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half)

    def plain(self) -> list[str | bool]:
        """For a key."""
        return [self.device.type, self.half]

    def placed(self, module: nn.Module) -> nn.Module:
        """`module` itself, on the device. Networks of convolutions alone keep channels last."""
        # Measured on `shapes` with two threads, seconds of a step of teacher and student, channels first and last:
        # decoder 0.087 and 0.056 in bfloat16, 0.16 and 0.14 in fp32; denoiser 0.14 and 0.17, 0.24 and 0.21.
        if any(isinstance(one, nn.Linear | nn.Conv3d) for one in module.modules()):
            return module.to(self.device)
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def fastest() -> Arithmetic:
    """A GPU where there is one; bfloat16 where the processor multiplies it."""
    if torch.cuda.is_available():
        return Arithmetic(torch.device("cuda"), torch.cuda.is_bf16_supported())
    return Arithmetic(torch.device("cpu"), bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def call(module: nn.Module, part: Component, given: Mapping[str, Tensor], together: bool) -> Tensor:
    """The first output [N, ...] in fp32 of `module`, called as `part` is; row by row where it takes no more at once."""
    inputs = [given[spec.name] for spec in part.inputs]
    # On a CPU the flash kernel's way back costs twice as much at few tokens.
    with sdpa_kernel([SDPBackend.MATH]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # autocast and a fp32 norm
        if together:
            made = module(*inputs)
            return (made if isinstance(made, Tensor) else made[0]).float()
        rows = [module(*(one[i : i + 1] for one in inputs)) for i in range(len(inputs[0]))]
    return torch.cat([one if isinstance(one, Tensor) else one[0] for one in rows]).float()


@torch.no_grad()
def takes_batches(part: Component) -> bool:
    """Whether two rows at once give what each gives alone; some networks fold the batch away."""
    inputs = part.example_inputs()
    if any(spec.shape[0] != 1 for spec in part.inputs):
        return False
    two = [torch.cat([one, one.flip(-1)]) if one.ndim > 1 else torch.cat([one, one]) for one in inputs]
    try:
        made = part.module(*two)
        alone = [part.module(*(one[i : i + 1] for one in two)) for i in range(2)]
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return False
    made, *alone = ((one if isinstance(one, Tensor) else one[0]) for one in (made, *alone))
    wanted = torch.cat(alone)
    return made.shape == wanted.shape and torch.allclose(made, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


@dataclass
class Pair:
    """The pruned network, called as the teacher's component is, and what is held against what inside them."""

    part: Component
    """The teacher's."""
    module: nn.Module
    taps: tuple[Tap, ...]
    arithmetic: Arithmetic
    together: bool = True

    def answers(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the pruned network says, what the teacher says, and how far apart they are inside."""
        with Watch(self.part.module, self.taps) as theirs, Watch(self.module, self.taps) as mine, self.arithmetic():
            with torch.no_grad():
                wanted = call(self.part.module, self.part, given, self.together)
            made = call(self.module, self.part, given, self.together)
            inside = difference(self.taps, mine.seen, theirs.seen) if self.taps else torch.zeros((), device=made.device)
        return made, wanted, inside


@dataclass
class Walks:
    """Lessons of a denoiser."""

    teacher: Student
    """Its networks on `pair.arithmetic.device`."""
    pair: Pair
    prompts: Sequence[str]
    batch: int
    seed: int
    features: float
    """What a relative error inside counts, beside one of the answer."""
    decoders: Pair | None = None
    """Given, rows that have come to their end are decoded, by the teacher's and by the pruned one, and learned from as
    pictures: both pruned networks learn."""
    own: float = 0.5
    """Share of rows that go on by the pruned network's own answers."""
    _latent: Tensor = field(default_factory=lambda: torch.zeros(()))
    _prompt: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    _count: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    _place: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    _conditions: dict[str, Tensor] = field(default_factory=dict)

    def learn(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + index)
        if not len(self._prompt):
            self._begin(generator)
        steps = [self._tables[c][p] for c, p in zip(self._count.tolist(), self._place.tolist(), strict=True)]
        latent = self._latent
        given = {
            **self._conditions,
            "latent": self._rows([one.input_scale for one in steps]) * latent,
            "timestep": torch.tensor([one.timestep for one in steps], device=latent.device),
        }
        made, wanted, inside = self.pair.answers(given)
        loss = (made - wanted).square().mean() / wanted.square().mean() + self.features * inside
        if self.decoders is not None:
            loss = loss + self._pictured(self.decoders, steps, made, wanted)
        self._go_on(steps, made.detach(), wanted, generator)
        return loss

    def _pictured(self, decoders: Pair, steps: Sequence[SamplerStep], made: Tensor, wanted: Tensor) -> Tensor:
        lengths = torch.tensor([len(self._tables[i]) for i in self._count.tolist()])
        last = torch.nonzero(self._place == lengths - 1).flatten().to(made.device)
        if not len(last):
            return torch.zeros((), device=made.device)
        before = (self._rows([one.sample for one in steps]) * self._latent)[last]
        weight = self._rows([one.prediction for one in steps])[last]
        name = decoders.part.inputs[0].name
        with self.pair.arithmetic():
            with torch.no_grad():
                ready = decoder_input(self.teacher, before + weight * wanted[last])
                truth = call(decoders.part.module, decoders.part, {name: ready}, decoders.together)
            ready = decoder_input(self.teacher, before + weight * made[last])
            drawn = call(decoders.module, decoders.part, {name: ready}, decoders.together)
        return picture_loss(drawn - truth)

    def state(self) -> dict[str, Tensor]:
        return {"latent": self._latent, "prompt": self._prompt, "count": self._count, "place": self._place}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._latent = state["latent"].to(self.pair.arithmetic.device, copy=True)
        self._prompt, self._count, self._place = (state[name].clone() for name in ("prompt", "count", "place"))
        if len(self._prompt):
            self._conditions = self._heard(self._prompt)

    @cached_property
    def _tables(self) -> tuple[tuple[SamplerStep, ...], ...]:
        assert self.teacher.config.sampler is not None
        return tuple(sampler_table(self.teacher, count) for count in sorted(self.teacher.config.sampler.times))

    @cached_property
    def _shares(self) -> Tensor:
        """Of walks of each step count: every count is as often asked as any other, and a walk of one step is asked
        once."""
        return torch.tensor([1 / len(table) for table in self._tables])

    def _begin(self, generator: torch.Generator) -> None:
        assert self.teacher.config.latent is not None
        shape = (self.batch, *self.teacher.config.latent.shape[1:])
        self._latent = torch.zeros(shape, device=self.pair.arithmetic.device)
        self._prompt = torch.zeros(self.batch, dtype=torch.int64)
        self._count, self._place = self._prompt.clone(), self._prompt.clone()
        self._conditions = {}
        self._set_out(torch.arange(self.batch), generator)

    def _set_out(self, rows: Tensor, generator: torch.Generator) -> None:
        """New prompts and noise for `rows`."""
        device = self._latent.device
        self._prompt[rows] = torch.randint(len(self.prompts), (len(rows),), generator=generator)
        self._count[rows] = torch.multinomial(self._shares, len(rows), replacement=True, generator=generator)
        self._place[rows] = 0
        self._latent[rows] = torch.randn((len(rows), *self._latent.shape[1:]), generator=generator).to(device)
        heard = self._heard(self._prompt[rows])
        if not self._conditions:
            self._conditions = heard
            return
        for name, value in heard.items():
            self._conditions[name][rows] = value

    @torch.no_grad()
    def _heard(self, prompts: Tensor) -> dict[str, Tensor]:
        given = self.teacher.given([self.prompts[i] for i in prompts.tolist()]).to(self.pair.arithmetic.device)
        made = condition(self.teacher, given)
        return {name: value.to(self.pair.arithmetic.device).clone() for name, value in made.items()}

    def _go_on(self, steps: Sequence[SamplerStep], made: Tensor, wanted: Tensor, generator: torch.Generator) -> None:
        mine = torch.arange(len(steps), device=made.device) < round(self.own * len(steps))
        answer = torch.where(mine.view(-1, *[1] * (made.ndim - 1)), made, wanted)
        after = self._rows([one.sample for one in steps]) * self._latent
        after = after + self._rows([one.prediction for one in steps]) * answer
        if any(one.noise for one in steps):
            fresh = torch.randn(after.shape, generator=generator).to(after.device)
            after = after + self._rows([one.noise for one in steps]) * fresh
        self._latent = after
        self._place += 1
        lengths = torch.tensor([len(self._tables[i]) for i in self._count.tolist()])
        done = torch.nonzero(self._place >= lengths).flatten()
        if len(done):
            self._set_out(done, generator)

    def _rows(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._latent.device).view(-1, *[1] * (self._latent.ndim - 1))


@dataclass
class Decoded:
    """Lessons of a decoder, on `latents` [N, ...] as the decoder wants them."""

    pair: Pair
    latents: Tensor
    batch: int
    seed: int
    features: float

    def learn(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + index)
        rows = torch.randint(len(self.latents), (self.batch,), generator=generator)
        latent = self.latents[rows]
        noise = torch.randn(latent.shape, generator=generator)
        latent = (latent + DISTURBED * latent.std() * noise).to(self.pair.arithmetic.device)
        made, wanted, inside = self.pair.answers({self.pair.part.inputs[0].name: latent})
        return picture_loss(made - wanted) + self.features * inside

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        pass


def picture_loss(error: Tensor) -> Tensor:
    """Absolute and squared: edges stay sharp, and nothing is far off."""
    return error.abs().mean() + error.square().mean()


@torch.no_grad()
def drawn_latents(
    teacher: Student, prompts: Sequence[str], count: int, seed: int, arithmetic: Arithmetic, batch: int
) -> Tensor:
    """What `teacher`'s denoiser draws of prompts in turn, [count, ...] as its decoder wants it, at every step count."""
    assert teacher.config.sampler is not None and teacher.config.latent is not None
    denoiser, made = teacher.components["denoiser"], []
    together = takes_batches(denoiser)
    tables = [sampler_table(teacher, one) for one in sorted(teacher.config.sampler.times)]
    for start in range(0, count, batch):
        generator = torch.Generator().manual_seed(seed + start)
        size = min(batch, count - start)
        rows = torch.randint(len(prompts), (size,), generator=generator)
        conditions = condition(teacher, teacher.given([prompts[i] for i in rows.tolist()]).to(arithmetic.device))
        latent = torch.randn((size, *teacher.config.latent.shape[1:]), generator=generator).to(arithmetic.device)
        for step in tables[start // batch % len(tables)]:
            moment = torch.full((size,), step.timestep, device=arithmetic.device)
            given = {**conditions, "latent": step.input_scale * latent, "timestep": moment}
            with arithmetic():
                answer = call(denoiser.module, denoiser, given, together)
            latent = step.sample * latent + step.prediction * answer
            if step.noise:
                latent = latent + step.noise * torch.randn(latent.shape, generator=generator).to(arithmetic.device)
        made.append(decoder_input(teacher, latent).cpu())
    return torch.cat(made)
