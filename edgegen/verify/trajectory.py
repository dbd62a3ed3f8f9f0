"""What a reference is made of, as plain arrays: artifacts are held against it without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgegen.bundle.manifest import PlanBound
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array
from edgegen.students.sampler import SamplerStep, moment

Picture = NDArray[np.uint8]
"""[H, W, 3]."""
Frames = NDArray[np.uint8]
"""[T, H, W, 3]."""
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One call of a component: named inputs, and the named outputs that the reference gives for them."""

    label: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Step:
    """One turn of the sampler; arrays are shaped as the latent, fp32. `noise` is the fresh noise of a stochastic
    sampler."""

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
    """One picture or video from prompt to pixels.

    `prompt` is the text, or the name of the example picture; `given` what the conditioning component takes for it
    (`input_ids` or `image`). `conditioning` holds all that the denoiser may ask for beside latent and time, by name.
    `noise` is the initial latent; `image` is what the decoder gives, [1, 3, H, W] or [1, 3, T, H, W] in -1..1.
    """

    prompt: str
    seed: int
    given: Array
    conditioning: Mapping[str, Array]
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
    given_b: Array
    predictions_b: tuple[Floats, ...]


@dataclass(frozen=True)
class Signature:
    """A component's static inputs and outputs, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def denoiser_inputs(self, latent: Array, step: SamplerStep, conditioning: Mapping[str, Array]) -> dict[str, Array]:
        """One call of a denoiser with this signature: what of `conditioning` it takes, and whatever it takes for the
        time."""
        names = {spec.name for spec in self.inputs}
        kept = {name: value for name, value in conditioning.items() if name in names}
        return {"latent": latent, **moment(step, names), **kept}


@dataclass(frozen=True)
class Reference:
    """Everything that artifacts are held against: samples per component, whole trajectories, and pairs of prompts."""

    signatures: Mapping[str, Signature]
    samples: Mapping[str, tuple[Sample, ...]]
    trajectories: tuple[Trajectory, ...] = ()
    pairs: tuple[Pair, ...] = ()
    latent_scale: float = 1.0
    latent_shift: float = 0.0
    conditions: Mapping[str, float] = field(default_factory=dict)
    """Scalars that the denoiser takes, as everything here was drawn with them."""
    planned: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    """Components that a plan compresses: `samples` with the outputs of the fake-quant reference, in the same order."""

    bounds: Mapping[str, PlanBound] = field(default_factory=dict)
    """Of those components."""

    @property
    def conditioning(self) -> str:
        """The component that runs once, before the denoiser."""
        return conditioning_component(self.signatures)

    def expected(self, component: str) -> tuple[Sample, ...]:
        """What an artifact of `component` is held to, call by call: its plan where it has one, else the student."""
        return self.planned.get(component, self.samples[component])

    def one_picture(self) -> dict[str, tuple[Sample, ...]]:
        """The samples of the first trajectory alone: each component once, the denoiser once a step."""
        if not self.trajectories:
            return dict(self.samples)
        steps = len(self.trajectories[0].steps)
        return {name: samples[: steps if name == "denoiser" else 1] for name, samples in self.samples.items()}


STRIP = 6
"""Frames of a video that are shown side by side where only one picture has room."""


def conditioning_component(components: Iterable[str]) -> str:
    """The component of a student that draws which is neither its denoiser nor its decoder."""
    return next(name for name in components if name not in ("denoiser", "decoder"))


def scalars(conditions: Mapping[str, float]) -> dict[str, Floats]:
    """Conditions as the denoiser takes them: [1] fp32 each."""
    return {name: np.array([value], dtype=np.float32) for name, value in conditions.items()}


def to_frames(decoded: Array) -> Frames:
    """[1, 3, H, W] or [1, 3, T, H, W] in -1..1 -> uint8 [T, H, W, 3], T = 1 for a picture; values outside are clipped,
    NaN becomes black."""
    film = decoded[0] if decoded.ndim == 5 else decoded[0][:, None]
    made = np.empty((*film.shape[1:], 3), dtype=np.uint8)
    for index in range(film.shape[1]):  # one at a time: a video in float64 may be larger than the memory
        unit = np.nan_to_num(np.asarray(film[:, index], dtype=np.float64), nan=-1.0).clip(-1.0, 1.0)
        made[index] = np.rint((unit + 1.0) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    return made


def strip(frames: Frames, at_most: int = STRIP) -> Picture:
    """Frames side by side, first and last among them, evenly chosen: [H, n W, 3]."""
    count = min(len(frames), at_most)
    chosen = np.rint(np.linspace(0, len(frames) - 1, count)).astype(int)
    return np.concatenate([frames[index] for index in chosen], axis=1)


def to_picture(decoded: Array) -> Picture:
    """What the decoder gave as one picture: itself, or for a video a strip of its frames."""
    return strip(to_frames(decoded))


def samples_of(signatures: Mapping[str, Signature], drawn: Sequence[Trajectory]) -> dict[str, tuple[Sample, ...]]:
    """Every call that the trajectories made, per component in their order; a prompt's encoding is taken once."""
    encoder = conditioning_component(signatures)
    found: dict[str, list[Sample]] = {encoder: [], "denoiser": [], "decoder": []}

    def add(component: str, label: str, inputs: Mapping[str, Array], output: Array) -> None:
        found[component].append(Sample(label, inputs, {signatures[component].outputs[0].name: output}))

    def only(component: str, value: Array) -> dict[str, Array]:
        return {signatures[component].inputs[0].name: value}

    for one in drawn:
        count = len(one.steps)
        if f"“{one.prompt}”" not in {sample.label for sample in found[encoder]}:
            encoded = {spec.name: one.conditioning[spec.name] for spec in signatures[encoder].outputs}
            found[encoder].append(Sample(f"“{one.prompt}”", only(encoder, one.given), encoded))
        for index, step in enumerate(one.steps, start=1):
            label = f"“{one.prompt}”, step {index} of {count}"
            given = signatures["denoiser"].denoiser_inputs(step.model_input, step.coefficients, one.conditioning)
            add("denoiser", label, given, step.prediction)
        add("decoder", f"“{one.prompt}”, {count} steps", only("decoder", one.decoder_input), one.image)
    return {name: tuple(samples) for name, samples in found.items()}
