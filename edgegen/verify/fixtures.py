"""The reference as files: written into the bundle, read back to verify it anywhere. Imports no torch.

Only what cannot be derived is stored. The decoder's and the denoiser's inputs follow from the latents and the sampler
table, a stochastic sampler's fresh noise from the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgegen.bundle.manifest import ComponentFixture, ComponentIO, Fixture, OtherPrompt, PlanBound, SamplerTable
from edgegen.bundle.noise import normal
from edgegen.errors import EdgegenError
from edgegen.lower.backend import Array
from edgegen.students.config import LatentConfig
from edgegen.verify.trajectory import Pair, Reference, Sample, Signature, Step, Trajectory, samples_of, scalars


def store(reference: Reference, root: Path) -> tuple[tuple[Fixture, ...], tuple[ComponentFixture, ...]]:
    """Write `reference` below `root`/fixtures and say where everything is, relative to `root`."""
    from PIL import Image

    def save(name: str, value: Array) -> str:
        path = root / "fixtures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, value, allow_pickle=False)
        return f"fixtures/{name}"

    pairs = {id(pair.a): pair for pair in reference.pairs}
    fixtures = []
    for index, one in enumerate(reference.trajectories):
        (spec,) = reference.signatures[reference.conditioning].inputs
        name = spec.name
        at = f"{index:02d}"
        pair = pairs.get(id(one))
        other = None
        if pair is not None:
            other = OtherPrompt(
                prompt=pair.prompt_b,
                inputs={name: save(f"{at}/other/{_file(name)}.npy", pair.given_b)},
                predictions=tuple(
                    save(f"{at}/other/prediction-{k}.npy", value) for k, value in enumerate(pair.predictions_b, start=1)
                ),
            )
        fixture = Fixture(
            prompt=one.prompt,
            seed=one.seed,
            steps=len(one.steps),
            inputs={name: save(f"{at}/{_file(name)}.npy", one.given)},
            conditioning={
                key: save(f"{at}/{key}.npy", value)
                for key, value in one.conditioning.items()
                if key not in reference.conditions
            },
            noise=save(f"{at}/noise.npy", one.noise),
            predictions=tuple(save(f"{at}/prediction-{k}.npy", s.prediction) for k, s in enumerate(one.steps, start=1)),
            latents=tuple(save(f"{at}/latent-{k}.npy", s.latent_out) for k, s in enumerate(one.steps, start=1)),
            image=save(f"{at}/image.npy", one.image),
            picture=f"fixtures/{at}/picture.png",
            other=other,
        )
        Image.fromarray(one.picture).save(root / fixture.picture, optimize=False)
        fixtures.append(fixture)
    if reference.trajectories:
        return tuple(fixtures), ()
    calls = []
    for component, samples in reference.samples.items():
        for index, sample in enumerate(samples):
            at = f"{component}/{index:02d}"
            calls.append(
                ComponentFixture(
                    component=component,
                    label=sample.label,
                    inputs={name: save(f"{at}/in-{name}.npy", value) for name, value in sample.inputs.items()},
                    outputs={name: save(f"{at}/out-{name}.npy", value) for name, value in sample.outputs.items()},
                )
            )
    return (), tuple(calls)


def store_planned(reference: Reference, root: Path) -> dict[str, tuple[dict[str, str], ...]]:
    """Write what the fake-quant reference gives below `root`/fixtures/planned: component -> for each of its samples,
    output -> path relative to `root`."""
    stored: dict[str, tuple[dict[str, str], ...]] = {}
    for component, samples in reference.planned.items():
        calls = []
        for index, sample in enumerate(samples):
            folder = f"fixtures/planned/{component}/{index:02d}"
            (root / folder).mkdir(parents=True, exist_ok=True)
            for name, value in sample.outputs.items():
                np.save(root / folder / f"{name}.npy", value, allow_pickle=False)
            calls.append({name: f"{folder}/{name}.npy" for name in sample.outputs})
        stored[component] = tuple(calls)
    return stored


def restore(
    root: Path,
    components: dict[str, ComponentIO],
    fixtures: Sequence[Fixture],
    component_fixtures: Sequence[ComponentFixture] = (),
    sampler: SamplerTable | None = None,
    latent: LatentConfig | None = None,
    planned: Mapping[str, Sequence[Mapping[str, str]]] | None = None,
    bounds: Mapping[str, PlanBound] | None = None,
    conditions: Mapping[str, float] | None = None,
) -> Reference:
    """The reference that `store` wrote below `root`. EdgegenError names a file that is not the array it should be."""

    def load(name: str) -> Any:
        try:
            value = np.load(root / name, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise EdgegenError(f"fixture `{name}` cannot be read: {error}", hint="build the bundle again") from error
        return value

    def with_planned(made: Reference) -> Reference:
        found = {}
        for name, calls in (planned or {}).items():
            outputs = [{output: load(path) for output, path in call.items()} for call in calls]
            pairs = zip(made.samples[name], outputs, strict=True)
            found[name] = tuple(replace(sample, outputs=values) for sample, values in pairs)
        return replace(made, planned=found, bounds=bounds or {})

    signatures = {name: Signature(io.inputs, io.outputs) for name, io in components.items()}
    if not fixtures:
        samples: dict[str, list[Sample]] = {name: [] for name in components}
        for call in component_fixtures:
            inputs = {name: load(path) for name, path in call.inputs.items()}
            outputs = {name: load(path) for name, path in call.outputs.items()}
            samples[call.component].append(Sample(call.label, inputs, outputs))
        return with_planned(Reference(signatures, {name: tuple(found) for name, found in samples.items()}))
    assert sampler is not None and latent is not None
    trajectories, pairs = [], []
    for fixture in fixtures:
        files = {name: load(name) for name in _paths(fixture)}
        one = _trajectory(fixture, sampler, latent, files, conditions or {})
        trajectories.append(one)
        if fixture.other is not None:
            predictions = tuple(load(name) for name in fixture.other.predictions)
            (given,) = fixture.other.inputs.values()
            pairs.append(Pair(one, fixture.other.prompt, load(given), predictions))
    kept = tuple(trajectories)
    samples_kept = samples_of(signatures, kept)
    made = Reference(
        signatures, samples_kept, kept, tuple(pairs), latent.scale, latent.shift, conditions=conditions or {}
    )
    return with_planned(made)


def _file(name: str) -> str:
    """The stem of what the conditioning component takes; `image` is the decoder's word for what it gives."""
    return f"given-{name}" if name == "image" else name


def _paths(fixture: Fixture) -> tuple[str, ...]:
    return (
        *fixture.inputs.values(),
        *fixture.conditioning.values(),
        fixture.noise,
        fixture.image,
        *fixture.predictions,
        *fixture.latents,
    )


def _trajectory(
    fixture: Fixture,
    sampler: SamplerTable,
    latent: LatentConfig,
    files: dict[str, Any],
    conditions: Mapping[str, float],
) -> Trajectory:
    x = files[fixture.noise]
    (given,) = fixture.inputs.values()
    encoded = {name: files[path] for name, path in fixture.conditioning.items()}
    steps = []
    table = sampler.tables[fixture.steps]
    rows = zip(table, fixture.predictions, fixture.latents, strict=True)
    for index, (row, prediction, after) in enumerate(rows, start=1):
        noise = normal(fixture.seed, index, x.shape[1:])[None] if row.noise else None
        steps.append(Step(row, x, np.float32(row.input_scale) * x, files[prediction], files[after], noise))
        x = files[after]
    ready = np.float32(latent.scale) * x + np.float32(latent.shift)
    return Trajectory(
        fixture.prompt,
        fixture.seed,
        files[given],
        {**encoded, **scalars(conditions)},
        files[fixture.noise],
        tuple(steps),
        ready,
        files[fixture.image],
    )
