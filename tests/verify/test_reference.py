import dataclasses

import numpy as np
import pytest
import torch

from edgegen.errors import EdgegenError, UsageError
from edgegen.students.sample import draw
from edgegen.verify.reference import reference, trajectory
from edgegen.verify.trajectory import to_picture


def test_the_trajectory_is_the_students_own_drawing(shapes):
    prompt = shapes.config.example_prompts[0]
    for steps in shapes.config.sampler.times:
        one = trajectory(shapes, prompt, 7, steps)
        assert len(one.steps) == steps
        np.testing.assert_allclose(one.image, draw(shapes, [prompt], [7], steps).numpy(), rtol=0, atol=1e-5)


def test_steps_chain_and_follow_the_table(shapes):
    one = trajectory(shapes, shapes.config.example_prompts[1], 3, 4)
    assert np.array_equal(one.steps[0].latent_in, one.noise)
    for before, after in zip(one.steps[:-1], one.steps[1:], strict=True):
        assert np.array_equal(before.latent_out, after.latent_in)
    for step, row in zip(one.steps, shapes.config.sampler.table(4), strict=True):
        assert step.timestep == row.timestep
        expected = row.sample * step.latent_in + row.prediction * step.prediction
        np.testing.assert_allclose(step.latent_out, expected, rtol=0, atol=1e-5)
    latent = shapes.config.latent
    np.testing.assert_allclose(one.decoder_input, latent.scale * one.steps[-1].latent_out + latent.shift, atol=1e-5)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(shapes):
    prompt = shapes.config.example_prompts[0]
    one, same, other = (trajectory(shapes, prompt, seed, 1) for seed in (5, 5, 6))
    assert np.array_equal(one.image, same.image)
    assert not np.allclose(one.noise, other.noise)


def test_every_prompt_every_step_and_every_step_count_is_a_sample(shapes):
    made = reference(shapes)
    prompts = shapes.config.example_prompts[:4]
    counts, default = sorted(shapes.config.sampler.times), shapes.config.sampler.default_steps
    assert len(made.samples["text_encoder"]) == len(prompts) == len(made.pairs)
    expected = len(prompts) * default + sum(n for n in counts if n != default)
    assert len(made.samples["denoiser"]) == expected
    assert {len(one.steps) for one in made.trajectories} == set(counts)
    assert all(len(pair.predictions_b) == default and pair.prompt_b != pair.a.prompt for pair in made.pairs)
    labels = [sample.label for sample in made.samples["denoiser"]]
    assert len(set(labels)) == len(labels)
    for name, component in shapes.components.items():
        for sample in made.samples[name]:
            assert {s.name: s.shape for s in component.inputs} == {k: v.shape for k, v in sample.inputs.items()}
            assert {s.name: s.dtype for s in component.inputs} == {k: v.dtype.name for k, v in sample.inputs.items()}
            assert {s.name: s.shape for s in component.outputs} == {k: v.shape for k, v in sample.outputs.items()}


def test_one_picture_is_one_call_a_component_and_a_step(shapes_reference):
    counts = {name: len(samples) for name, samples in shapes_reference.one_picture().items()}
    assert counts == {"text_encoder": 1, "denoiser": 2, "decoder": 1}


def test_a_single_prompt_is_paired_with_the_empty_one(shapes):
    made = reference(shapes, prompts=["a large red circle in the center"], step_counts=[1])
    assert [pair.prompt_b for pair in made.pairs] == [""]
    assert not np.allclose(made.pairs[0].predictions_b[0], made.trajectories[0].steps[0].prediction)


def test_unknown_step_counts_are_a_usage_error(shapes):
    with pytest.raises(UsageError, match="3 steps"):
        trajectory(shapes, "a large red circle in the center", 0, 3)


def test_a_student_that_gives_nan_is_refused(shapes):
    decoder = shapes.components["decoder"]

    class Broken(torch.nn.Module):
        def forward(self, latent):
            return decoder.module(latent) * float("nan")

    components = {**shapes.components, "decoder": dataclasses.replace(decoder, module=Broken())}
    with pytest.raises(EdgegenError, match="NaN or infinity in `decoder`"):
        trajectory(dataclasses.replace(shapes, components=components), "a large red circle in the center", 0, 1)


def test_pictures_are_clipped_and_nan_is_black():
    image = np.array([-2.0, -1.0, 0.0, 1.0, 3.0, np.nan], dtype=np.float32).reshape(1, 1, 1, 6).repeat(3, axis=1)
    assert to_picture(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]
