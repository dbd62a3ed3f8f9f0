"""Plans of students that are asked with more than one context: several outputs, scalars, pictures."""

import numpy as np
import pytest
import torch

from edgegen.precision.calibrate import calibrate
from edgegen.precision.canonical import canonical_programs
from edgegen.precision.conditioning import asked, pack
from edgegen.precision.prompts import check_prompts, default_settings, prompts_for
from edgegen.precision.simulate import Drawing, Network
from edgegen.precision.sites import sites
from edgegen.students.families.registry import new
from edgegen.verify.reference import pair, trajectory

FEW = default_settings().model_copy(update={"fewest": 2, "observer": "minmax"})


@pytest.fixture(scope="module")
def programs(film):
    return canonical_programs(film)


@pytest.fixture(scope="module")
def drawing(film, programs):
    return Drawing(film, {name: Network(name, program, sites(program)) for name, program in programs.items()})


def test_one_output_is_itself(film):
    value = torch.randn(1, 16, 1, 2, 2)
    assert pack([value]) is value
    found = asked(film, value, ("latent", "image_latent", "flow_score"))
    assert found["image_latent"] is value and found["flow_score"].tolist() == [1.0]
    assert asked(film, value, ("latent",)) == {}


def test_several_outputs_are_taken_apart_again():
    student = new("sdxs-1024", "tiny")
    specs = student.conditioning.outputs
    assert len(specs) > 1
    outputs = [torch.randn(spec.shape, requires_grad=True) for spec in specs]
    packed = pack(outputs)
    assert packed.shape == (1, sum(one.numel() for one in outputs))
    found = asked(student, packed, [spec.name for spec in specs])
    for spec, one in zip(specs, outputs, strict=True):
        assert torch.equal(found[spec.name], one)
    found[specs[1].name].sum().backward()
    assert outputs[0].grad is not None and not outputs[0].grad.any()
    assert outputs[1].grad is not None and bool((outputs[1].grad == 1).all())


def test_graphs_draw_the_video_of_the_student(film, drawing):
    truth = trajectory(film, "example picture 1", 5, 2)
    drawn = drawing.draw(film.given(["example picture 1"]), 5, 2)
    np.testing.assert_allclose(drawn.image.numpy(), truth.image, rtol=1e-3, atol=1e-3)
    other = pair(film, truth, "another")
    answers = drawing.answers(drawn, film.given(["another"]))
    for found, wanted in zip(answers, other.predictions_b, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-3)


def test_calibration_draws_example_pictures(film, programs):
    prompts = prompts_for(film)
    assert len(set(prompts)) >= default_settings().fewest
    assert check_prompts(film, prompts, FEW.fewest) == prompts
    ranges = calibrate(film, programs, prompts[:2], FEW, steps=(1,))
    for name, program in programs.items():
        assert set(ranges.components[name]) == set(sites(program))
    first = next(iter(ranges.components["image_encoder"].values())).input
    given = film.given(prompts[:2])
    assert first.low == pytest.approx(float(given.min()), abs=1e-5)
