"""What a reference is made of, as plain arrays: artifacts are held against it without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgegen.bundle.manifest import PlanBound
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array
from edgegen.students.sampler import SamplerStep, moment

Picture = NDArray[np.uint8]
"""[H, W, 3]."""
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One call of a component: named inputs, and the named outputs that the reference gives for them."""

    label: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Step:
    """One turn of the sampler; arrays are [1, C, H, W] fp32. `noise` is the fresh noise of a stochastic sampler."""

    coefficients: SamplerStep
    latent_in: Floats
    model_input: Floats
    prediction: Floats
    latent_out: Floats
    noise: Floats | None

    @property
    def timestep(self) -> float:
        return self.coefficients.timestep


@dataclass(frozen=True)
class Trajectory:
    """One picture from prompt to pixels. `noise` is the initial latent; `image` is [1, 3, H, W] in -1..1."""

    prompt: str
    seed: int
    input_ids: Array
    context: Floats
    noise: Floats
    steps: tuple[Step, ...]
    decoder_input: Floats
    image: Floats

    @property
    def picture(self) -> Picture:
        return to_picture(self.image)


@dataclass(frozen=True)
class Pair:
    """Two prompts at the same latents, those of `a`; `predictions_b` is the denoiser's word on them for prompt `b`."""

    a: Trajectory
    prompt_b: str
    input_ids_b: Array
    predictions_b: tuple[Floats, ...]


@dataclass(frozen=True)
class Signature:
    """A component's static inputs and outputs, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def denoiser_inputs(self, latent: Array, step: SamplerStep, context: Array) -> dict[str, Array]:
        """One call of a denoiser with this signature, whatever it takes for the time."""
        names = {spec.name for spec in self.inputs}
        return {"latent": latent, **moment(step, names), "context": context}


@dataclass(frozen=True)
class Reference:
    """Everything that artifacts are held against: samples per component, whole trajectories, and pairs of prompts."""

    signatures: Mapping[str, Signature]
    samples: Mapping[str, tuple[Sample, ...]]
    trajectories: tuple[Trajectory, ...] = ()
    pairs: tuple[Pair, ...] = ()
    latent_scale: float = 1.0
    latent_shift: float = 0.0
    planned: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    """Components that a plan compresses: `samples` with the outputs of the fake-quant reference, in the same order."""

    bounds: Mapping[str, PlanBound] = field(default_factory=dict)
    """Of those components."""

    def expected(self, component: str) -> tuple[Sample, ...]:
        """What an artifact of `component` is held to, call by call: its plan where it has one, else the student."""
        return self.planned.get(component, self.samples[component])

    def one_picture(self) -> dict[str, tuple[Sample, ...]]:
        """The samples of the first trajectory alone: each component once, the denoiser once a step."""
        if not self.trajectories:
            return dict(self.samples)
        steps = len(self.trajectories[0].steps)
        return {name: samples[: steps if name == "denoiser" else 1] for name, samples in self.samples.items()}


def to_picture(image: Array) -> Picture:
    """[1, 3, H, W] in -1..1 -> uint8 [H, W, 3]; values outside are clipped, NaN becomes black."""
    unit = np.nan_to_num(np.asarray(image[0], dtype=np.float64), nan=-1.0).clip(-1.0, 1.0)
    return np.rint((unit + 1.0) * 127.5).astype(np.uint8).transpose(1, 2, 0)


def samples_of(signatures: Mapping[str, Signature], drawn: Sequence[Trajectory]) -> dict[str, tuple[Sample, ...]]:
    """Every call that the trajectories made, per component in their order; a prompt's encoding is taken once."""
    found: dict[str, list[Sample]] = {"text_encoder": [], "denoiser": [], "decoder": []}

    def add(component: str, label: str, inputs: Mapping[str, Array], output: Array) -> None:
        found[component].append(Sample(label, inputs, {signatures[component].outputs[0].name: output}))

    def only(component: str, value: Array) -> dict[str, Array]:
        return {signatures[component].inputs[0].name: value}

    for one in drawn:
        count = len(one.steps)
        if f"“{one.prompt}”" not in {sample.label for sample in found["text_encoder"]}:
            add("text_encoder", f"“{one.prompt}”", only("text_encoder", one.input_ids), one.context)
        for index, step in enumerate(one.steps, start=1):
            label = f"“{one.prompt}”, step {index} of {count}"
            given = signatures["denoiser"].denoiser_inputs(step.model_input, step.coefficients, one.context)
            add("denoiser", label, given, step.prediction)
        add("decoder", f"“{one.prompt}”, {count} steps", only("decoder", one.decoder_input), one.image)
    return {name: tuple(samples) for name, samples in found.items()}
