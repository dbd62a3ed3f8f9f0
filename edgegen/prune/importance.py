"""How much each unit matters: what zeroing it does to the final picture, and to how prompts are heard.

A unit is zeroed by zeroing the weights by which what follows reads it. To first order that moves the picture by the sum
of those weights times the gradient at them, through the layers that follow, the steps that follow and the decoder. The
mean square over random vectors v of signs of (sum of w * d(v . picture)/dw) is the squared change of the whole picture
(Hutchinson's estimator, as `edgegen.precision.sensitivity` has it): a backward pass gives it for every unit of every
space at once. Molchanov et al. 2019 (arXiv 1906.10771) rank by the same product, of a training loss.

How a prompt is heard: the change, to first order, of the norm of the difference between the denoiser's answers to two
prompts, as a share of that norm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr
from torch import Tensor

from edgegen.precision.pictures import PEAK_SQUARED
from edgegen.precision.prompts import prompts_for
from edgegen.prune.space import Space, Spaces
from edgegen.students.sample import condition, decoder_input, initial_noise, sampler_table
from edgegen.students.sampler import SamplerStep
from edgegen.students.student import Component, Student
from edgegen.verify.metrics import DEGENERATE_BELOW

Floats = npt.NDArray[np.float64]
HEARD = 0.01
"""What a squared share of how prompts are heard weighs beside a picture: a tenth of it as much as 40 dB."""
SEED = 100_000
"""Sample i starts from the noise of this and i: those that calibration draws from."""


class Scores(NamedTuple):
    """Of a component, space -> [units]: expected squared changes of the picture, over the square of its peak, and of
    the norm of what a prompt changes, as a share of it."""

    picture: dict[str, Floats]
    conditioning: dict[str, Floats]

    @property
    def units(self) -> dict[str, Floats]:
        """Both as one number, by which units are ranked."""
        return {name: one + HEARD * self.conditioning[name] for name, one in self.picture.items()}


@dataclass(frozen=True)
class Probe:
    """A student that draws, and what it is tried on: prompts, `steps` steps, `vectors` random vectors a picture."""

    student: Student
    prompts: tuple[str, ...]
    steps: int
    vectors: int = 4

    @classmethod
    def of(cls, student: Student, samples: int = 8, steps: int | None = None, vectors: int = 4) -> Probe:
        """On calibration's prompts, evenly over them. A student that draws nothing has its own inputs."""
        sampler = student.config.sampler
        prompts = prompts_for(student)
        chosen = tuple(prompts[i * len(prompts) // samples] for i in range(min(samples, len(prompts))))
        return cls(student, chosen, 0 if sampler is None else steps or sampler.default_steps, vectors)

    @property
    def count(self) -> int:
        """Samples."""
        return len(self.prompts) if self.steps else len(self.student.components["model"].samples())


def importance(
    probe: Probe, spaces: Mapping[str, Spaces], done: Callable[[], None] = lambda: None
) -> dict[str, Scores]:
    """Of every unit of `spaces` (by component); `done` is called after each sample."""
    tally = _Tally(spaces, probe.vectors)
    for index in range(probe.count):
        (_drawn if probe.steps else _answered)(probe, index, tally)
        tally.close()
        done()
    return tally.scores(probe.count)


def magnitude(component: Component, spaces: Spaces) -> dict[str, Floats]:
    """The L2 norm of the weights that write each unit: what uniform pruning ranks by (Li et al. 2017, arXiv
    1608.08710)."""
    state = component.module.state_dict()
    return {
        space.name: np.sqrt(_gathered(space, "writes", lambda name: state[name].square())) for space in spaces.spaces
    }


def _gathered(space: Space, which: str, value: Callable[[str], Tensor]) -> Floats:
    """[units]: `value` of each parameter, summed over the positions of each unit."""
    sums = np.zeros(space.count)
    for cut in space.reads if which == "reads" else space.writes:
        tensor = value(cut.parameter)
        others = [dim for dim in range(tensor.ndim) if dim != cut.dim]
        rows = (tensor.sum(others) if others else tensor).double().numpy()
        held = cut.owners >= 0
        np.add.at(sums, cut.owners[held], rows[held])
    return sums


class _Tally:
    """Sums of weight times gradient over what reads a unit, one for each functional of a sample; then their squares.
    The last functional is how the prompt is heard."""

    def __init__(self, spaces: Mapping[str, Spaces], vectors: int) -> None:
        self.spaces = spaces
        self.vectors = vectors
        self._sums = self._zeros()
        self._squares = self._zeros()

    def _zeros(self) -> dict[tuple[str, str], Floats]:
        return {
            (component, space.name): np.zeros((self.vectors + 1, space.count))
            for component, found in self.spaces.items()
            for space in found.spaces
        }

    def read(self, component: str) -> list[str]:
        """The parameters whose gradients are wanted."""
        found = self.spaces[component].spaces if component in self.spaces else ()
        return list(dict.fromkeys(cut.parameter for space in found for cut in space.reads))

    def add(
        self, component: str, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], functional: int
    ) -> None:
        products = {
            name: torch.zeros_like(weights[name]) if one is None else weights[name].detach() * one
            for name, one in gradients.items()
        }
        if products:
            for space in self.spaces[component].spaces:
                self._sums[component, space.name][functional] += _gathered(space, "reads", products.__getitem__)

    def close(self) -> None:
        """A sample is done."""
        for key, sums in self._sums.items():
            self._squares[key] += sums**2
        self._sums = self._zeros()

    def scores(self, count: int) -> dict[str, Scores]:
        made = {}
        for component, found in self.spaces.items():
            squares = {space.name: self._squares[component, space.name] / count for space in found.spaces}
            made[component] = Scores(
                {name: one[:-1].mean(0) for name, one in squares.items()},
                {name: one[-1] for name, one in squares.items()},
            )
        return made


class _Call:
    """One call of a component, with the graph behind it: gradients at the weights of `tally` and at `leaves`."""

    def __init__(self, part: Component, inputs: Mapping[str, Tensor], leaves: Sequence[str], tally: _Tally) -> None:
        self._part, self._tally = part, tally
        held = dict(part.module.named_parameters(remove_duplicate=False))
        self._weights = {name: held[name].detach().clone().requires_grad_() for name in tally.read(part.name)}
        self._leaves = {name: inputs[name].detach().clone().requires_grad_() for name in leaves}
        given = {**inputs, **self._leaves}
        with torch.enable_grad():
            made = torch.func.functional_call(
                part.module, self._weights, tuple(given[spec.name] for spec in part.inputs), tie_weights=True
            )
        self.outputs: tuple[Tensor, ...] = (made,) if isinstance(made, Tensor) else tuple(made)

    def backward(self, toward: Sequence[Tensor | None], functional: int) -> dict[str, Tensor]:
        """Add to the tally; the gradients at the leaves, zeros where an output does not depend on one."""
        pairs = [
            (out, to) for out, to in zip(self.outputs, toward, strict=True) if to is not None and out.requires_grad
        ]
        wanted = [*self._weights.values(), *self._leaves.values()]
        if not pairs or not wanted:
            return {name: torch.zeros_like(one) for name, one in self._leaves.items()}
        found = torch.autograd.grad(
            [out for out, _ in pairs], wanted, [to for _, to in pairs], retain_graph=True, allow_unused=True
        )
        own = dict(zip(self._weights, found, strict=False))
        self._tally.add(self._part.name, self._weights, own, functional)
        beside = zip(self._leaves.items(), found[len(self._weights) :], strict=True)
        return {name: torch.zeros_like(leaf) if one is None else one for (name, leaf), one in beside}


def _answered(probe: Probe, index: int, tally: _Tally) -> None:
    """A student that draws nothing: its outputs, over the mean square of each."""
    part = probe.student.components["model"]
    inputs = dict(zip((spec.name for spec in part.inputs), part.samples()[index], strict=True))
    call = _Call(part, inputs, (), tally)
    generator = torch.Generator().manual_seed(index)
    for k in range(probe.vectors):
        toward = [
            _signs(one, generator) / math.sqrt(one.numel() * max(1e-20, float(one.detach().square().mean())))
            if one.is_floating_point()
            else None
            for one in call.outputs
        ]
        call.backward(toward, k)


def _drawn(probe: Probe, index: int, tally: _Tally) -> None:
    """A picture, then the steps backwards: one call's activations are held at a time."""
    student = probe.student
    seed, given = SEED + index, student.given([probe.prompts[index]])
    other = student.given([probe.prompts[(index + 1) % len(probe.prompts)]])
    table = sampler_table(student, probe.steps)
    wanted = condition(student, given)
    latents, last = _trajectory(student, table, wanted, seed)
    generator = torch.Generator().manual_seed(index)
    toward = _decoder(probe, decoder_input(student, last), generator, tally)
    if not {student.conditioning.name, "denoiser"} & set(tally.spaces):
        return
    names = [spec.name for spec in student.conditioning.outputs]
    names = [name for name in names if wanted[name].is_floating_point() and name in _asked(student)]
    at = [{name: torch.zeros_like(wanted[name]) for name in names} for _ in range(probe.vectors + 1)]
    away = {name: torch.zeros_like(wanted[name]) for name in names}
    unwanted = condition(student, other)
    denoiser = student.components["denoiser"]
    for step, x in reversed(list(zip(table, latents, strict=True))):
        call = _Call(denoiser, _inputs(step, x, wanted), ["latent", *names], tally)
        (answer,) = call.outputs
        before = []
        for k in range(probe.vectors):
            found = call.backward([step.prediction * toward[k]], k)
            before.append(step.sample * toward[k] + step.input_scale * found["latent"])
            for name in names:
                at[k][name] += found[name]
        said = _Call(denoiser, _inputs(step, x, unwanted), names, tally)
        difference = (answer - said.outputs[0]).detach()
        if float(difference.std()) > DEGENERATE_BELOW * float(answer.detach().std()):
            heard = difference / difference.square().sum() / len(table)
            for one, sign, sums in ((call, 1.0, at[-1]), (said, -1.0, away)):
                found = one.backward([sign * heard], probe.vectors)
                for name in names:
                    sums[name] += found[name]
        toward = before
    if student.conditioning.name in tally.spaces:
        _conditioning(student, given, at, tally)
        _conditioning(student, other, [away], tally, first=probe.vectors)


def _asked(student: Student) -> set[str]:
    return {spec.name for spec in student.components["denoiser"].inputs}


def _inputs(step: SamplerStep, x: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**conditioning, "latent": step.input_scale * x, "timestep": torch.full((len(x),), step.timestep)}


@torch.no_grad()
def _trajectory(
    student: Student, table: Sequence[SamplerStep], conditioning: Mapping[str, Tensor], seed: int
) -> tuple[list[Tensor], Tensor]:
    """What each step starts from, and the last latent."""
    x, latents = initial_noise(student, [seed]), []
    for index, step in enumerate(table, start=1):
        latents.append(x)
        (prediction,) = student.components["denoiser"].call(_inputs(step, x, conditioning)).values()
        x = step.sample * x + step.prediction * prediction
        if step.noise:
            x = x + step.noise * initial_noise(student, [seed], stream=index)
    return latents, x


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).float() * 2 - 1


def _decoder(probe: Probe, ready: Tensor, generator: torch.Generator, tally: _Tally) -> list[Tensor]:
    """What each functional is of the last latent."""
    latent, decoder = probe.student.config.latent, probe.student.components["decoder"]
    assert latent is not None
    name = decoder.inputs[0].name
    call = _Call(decoder, {name: ready}, [name], tally)
    (image,) = call.outputs
    scale = 1.0 / math.sqrt(image.numel() * PEAK_SQUARED)
    return [latent.scale * call.backward([_signs(image, generator) * scale], k)[name] for k in range(probe.vectors)]


def _conditioning(
    student: Student, given: Tensor, toward: Sequence[Mapping[str, Tensor]], tally: _Tally, first: int = 0
) -> None:
    part = student.conditioning
    call = _Call(part, {part.inputs[0].name: given}, (), tally)
    for k, one in enumerate(toward, start=first):
        call.backward([one.get(spec.name) for spec in part.outputs], k)


# Measured


def zeroed(student: Student, component: str, space: Space, units: Sequence[int]) -> Student:
    """`student` with these units read as zero: what scores estimate."""
    part = student.components[component]
    module = copy.deepcopy(part.module)
    state = module.state_dict()
    for index in units:
        for parameter, dim, positions in space.unit(index).reads:
            state[parameter].index_fill_(dim, torch.tensor(positions), 0.0)
    made = Component(part.name, module, part.inputs, part.outputs, part.examples)
    return Student(student.config, {**student.components, component: made}, student.tokenizer_json)


def confirmed(
    probe: Probe,
    spaces: Mapping[str, Spaces],
    scores: Mapping[str, Scores],
    units: int = 24,
    done: Callable[[], None] = lambda: None,
) -> tuple[float | None, int]:
    """Spearman's rank correlation of the scores with what zeroing single units was measured to do to the pictures, and
    how many units were measured: evenly over the ranks. None where there are fewer than three, or nothing is drawn."""
    ranked = sorted(
        (
            (float(score), component, space, index)
            for component, found in spaces.items()
            for space in found.spaces
            for index, score in enumerate(scores[component].picture[space.name])
        ),
        key=lambda one: -one[0],
    )
    chosen = [ranked[i * len(ranked) // units] for i in range(min(units, len(ranked)))]
    if len(chosen) < 3 or not probe.steps:
        return None, 0
    expected = _pictures(probe, probe.student)
    measured = []
    for _, component, space, index in chosen:
        made = _pictures(probe, zeroed(probe.student, component, space, [index]))
        measured.append(sum(float((one - other).square().mean()) for one, other in zip(made, expected, strict=True)))
        done()
    return float(spearmanr([one[0] for one in chosen], measured).statistic), len(chosen)


@torch.no_grad()
def _pictures(probe: Probe, student: Student) -> list[Tensor]:
    made: list[Tensor] = []
    decoder = student.components["decoder"]
    for index, prompt in enumerate(probe.prompts):
        conditioning = condition(student, student.given([prompt]))
        _, last = _trajectory(student, sampler_table(student, probe.steps), conditioning, SEED + index)
        made += decoder.call({decoder.inputs[0].name: decoder_input(student, last)}).values()
    return made
