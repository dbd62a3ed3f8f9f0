"""Networks that the int8 benchmarks are about, each as a component of a student that a plan can be made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.config import ComponentConfig, StudentConfig
from edgegen.students.load import load
from edgegen.students.networks.unet import UNet, UNetConfig
from edgegen.students.shapes import family
from edgegen.students.student import Component, Student
from edgegen.verify.reference import reference

MODELS = ("shapes", "S64", "R")
SMALL = UNetConfig(sample_size=32, block_out_channels=(64, 128, 256), num_heads=8, cross_attention_dim=256)
BIG = UNetConfig(sample_size=64)
TIME = 999.0
CALLS = {"S64": 8, "R": 1}
"""That ranges are observed on: a tensor of a million values has the same range in every call."""
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """One network; `calibration` is what the runtimes' own tools observe ranges on, `held_out` what all are judged on.

    Ours are observed on the student's own trajectory, of which `calibration` is a part; what is called alone has the
    same calls for all.
    """

    name: str
    student: Student
    part: Component
    calibration: Sequence[Inputs]
    held_out: Sequence[Inputs]

    @property
    def module(self) -> nn.Module:
        return self.part.module

    @property
    def example(self) -> tuple[Tensor, ...]:
        return tuple(self.held_out[0].values())

    @property
    def timesteps(self) -> tuple[float, ...]:
        """At which it is called, by the inputs' names."""
        sampler = self.student.config.sampler
        return sampler.timesteps() if sampler is not None and "timestep" in self.held_out[0] else ()

    def as_rewritten(self, given: Inputs) -> dict[str, Tensor]:
        """With the step that a graph of several timesteps is called by, which the passes put in the time's place."""
        if not self.timesteps:
            return dict(given)
        times = self.timesteps
        nearest = min(range(len(times)), key=lambda i: abs(times[i] - float(given["timestep"])))
        return {**given, "step": torch.tensor([nearest], dtype=torch.int32)}


def subjects(model: str, components: Sequence[str]) -> Iterator[Subject]:
    """`components` are those of `shapes`."""
    if model != "shapes":
        yield _alone(model, BIG if model == "R" else SMALL)
        return
    student = load(family.WEIGHTS)
    drawn = reference(student, prompts=student.config.example_prompts[:4], seed=7, step_counts=(4,))
    for name in components:
        part = student.components[name]
        calls = [{key: torch.from_numpy(v) for key, v in one.inputs.items()} for one in drawn.samples[name]]
        first = len(calls) // 4  # those of the first prompt
        part.module.eval()
        yield Subject(f"shapes {name}", student, part, calls[first:], calls[:first])


class AtOneTime(nn.Module):
    """A UNet whose every call is at one timestep, as a one-step student's are: latent, context -> prediction."""

    def __init__(self, unet: UNet, timestep: float) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("timestep", torch.tensor([timestep]))

    def forward(self, latent: Tensor, context: Tensor) -> Tensor:
        prediction: Tensor = self.unet(latent, self.timestep, context)
        return prediction


def _alone(name: str, config: UNetConfig) -> Subject:
    """A student that is nothing but one untrained UNet."""
    torch.manual_seed(0)
    module = AtOneTime(UNet(config), TIME).eval()
    latent = (1, config.in_channels, config.sample_size, config.sample_size)
    inputs = (_spec("latent", latent), _spec("context", (1, 77, config.cross_attention_dim)))
    outputs = (_spec("prediction", (1, config.out_channels, *latent[2:])),)
    *calibration, held_out = (_drawn(inputs, seed) for seed in range(1 + CALLS[name]))
    examples = tuple(tuple(one.values()) for one in calibration)
    part = Component("model", module, inputs, outputs, examples)
    made = ComponentConfig(architecture="unet", config=config.model_dump(), inputs=inputs, outputs=outputs)
    student = Student(StudentConfig(name=name.lower(), task="single", components={"model": made}), {"model": part})
    return Subject(name, student, part, calibration, [held_out])


def _drawn(inputs: Sequence[TensorSpec], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in inputs}


def _spec(name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype="float32")
