"""The reference: what the uncompiled student computes in torch fp32, as `edgegen.verify.trajectory` keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from edgegen.errors import EdgegenError
from edgegen.lower.backend import Array
from edgegen.students.example_picture import EXAMPLE_NAMES
from edgegen.students.sample import StepRecord, condition, decode, decoder_input, denoise, initial_noise
from edgegen.students.student import Component, Student
from edgegen.verify.trajectory import Pair, Reference, Sample, Signature, Step, Trajectory, samples_of

MAX_PROMPTS, MAX_VIDEOS = 4, 2


def trajectory(student: Student, prompt: str, seed: int, steps: int) -> Trajectory:
    """Draw `prompt` from the noise of `seed`; UsageError for a number of steps the student was not distilled for."""
    given = student.given([prompt])
    conditioning = condition(student, given)
    noise = initial_noise(student, [seed])
    records = list(denoise(student, conditioning, [seed], steps))
    ready = decoder_input(student, records[-1].latent_out)
    image = decode(student, ready)
    made = Trajectory(
        prompt=prompt,
        seed=seed,
        given=given.numpy(),
        conditioning={name: value.numpy() for name, value in conditioning.items()},
        noise=noise.numpy(),
        steps=tuple(_step(student, record, seed, index) for index, record in enumerate(records, start=1)),
        decoder_input=ready.numpy(),
        image=image.numpy(),
    )
    _require_finite(student, student.conditioning.name, list(made.conditioning.values()))
    _require_finite(student, "denoiser", [step.prediction for step in made.steps])
    _require_finite(student, "decoder", [made.image])
    return made


def pair(student: Student, a: Trajectory, prompt_b: str) -> Pair:
    """The denoiser at the latents of `a`, listening to `prompt_b`."""
    given = student.given([prompt_b])
    conditioning = condition(student, given)
    denoiser = student.components["denoiser"]
    found = []
    for step in a.steps:
        at = {"latent": torch.from_numpy(step.model_input), "timestep": torch.tensor([step.timestep])}
        (prediction,) = denoiser.call({**conditioning, **at}).values()
        found.append(prediction.numpy())
    _require_finite(student, "denoiser", found)
    return Pair(a, prompt_b, given.numpy(), tuple(found))


def reference(
    student: Student,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    step_counts: Sequence[int] | None = None,
    signatures: Mapping[str, Signature] | None = None,
) -> Reference:
    """The reference of `student`: its example prompts (at most four; two of a student that makes videos, which are
    large) at its default steps, the first at all others too.

    `step_counts` replaces those counts: the first is what every prompt is drawn at. Prompt i is drawn from seed
    `seed + i` and paired with its neighbour; a single prompt is paired with the empty one. A `single` student is called
    once on its example inputs. `signatures` are those of the components as they are lowered, where rewrites changed
    them. EdgegenError when the student's own output is not finite.
    """
    own = {name: Signature(part.inputs, part.outputs) for name, part in student.components.items()}
    signatures = signatures or own
    if student.config.task == "single":
        samples = {
            name: tuple(_single(student, part, signatures[name], given, label) for given, label in labelled(part))
            for name, part in student.components.items()
        }
        return Reference(signatures, samples)
    assert student.config.sampler is not None and student.config.latent is not None
    chosen = tuple(prompts if prompts is not None else _examples(student)) or ("",)
    default = student.config.sampler.default_steps
    counts = tuple(step_counts or (default, *(n for n in sorted(student.config.sampler.times) if n != default)))
    drawn = [trajectory(student, prompt, seed + i, counts[0]) for i, prompt in enumerate(chosen)]
    partners = (*chosen[1:], chosen[0]) if len(chosen) > 1 else ("",)
    pairs = tuple(pair(student, a, b) for a, b in zip(drawn, partners, strict=True) if a.prompt != b)
    drawn += [trajectory(student, chosen[0], seed, count) for count in counts[1:]]
    latent = student.config.latent
    return Reference(
        signatures,
        samples_of(signatures, drawn),
        tuple(drawn),
        pairs,
        latent.scale,
        latent.shift,
        student.config.conditions,
    )


def _examples(student: Student) -> tuple[str, ...]:
    if student.config.conditioning == "text_encoder":
        return student.config.example_prompts[:MAX_PROMPTS]
    return (student.config.example_prompts or EXAMPLE_NAMES)[:MAX_VIDEOS]


def labelled(component: Component) -> list[tuple[tuple[Tensor, ...], str]]:
    """The samples of a component without a trajectory, and what each is called."""
    if not component.examples:
        return [(component.example_inputs(), "example inputs")]
    number = len(component.examples)
    return [(sample, f"given inputs, {index} of {number}") for index, sample in enumerate(component.examples, start=1)]


def _single(
    student: Student, component: Component, signature: Signature, given: tuple[Tensor, ...], label: str
) -> Sample:
    outputs = [part.numpy() for part in _call(component, *given)]
    _require_finite(student, component.name, outputs)
    return Sample(
        label,
        {
            spec.name: value.numpy()
            for spec, value in zip(component.inputs, given, strict=True)
            if spec in signature.inputs
        },
        {spec.name: value for spec, value in zip(component.outputs, outputs, strict=True)},
    )


def _step(student: Student, record: StepRecord, seed: int, index: int) -> Step:
    fresh = initial_noise(student, [seed], stream=index).numpy() if record.step.noise else None
    return Step(
        coefficients=record.step,
        latent_in=record.latent_in.numpy(),
        model_input=record.model_input.numpy(),
        prediction=record.prediction.numpy(),
        latent_out=record.latent_out.numpy(),
        noise=fresh,
    )


def _call(component: Component, *inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out = component.module.eval()(*inputs)
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _require_finite(student: Student, component: str, values: Sequence[Array]) -> None:
    if not all(np.isfinite(value).all() for value in values):
        raise EdgegenError(
            f"student `{student.config.name}` gives NaN or infinity in `{component}` before anything is compiled",
            hint="check the checkpoint: there is nothing to hold artifacts against",
        )
