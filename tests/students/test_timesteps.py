"""Times that the authors of a student give at every call: sampled as diffusers samples them, and nothing else."""

import json

import pytest
import torch

from edgegen.cli.main import main
from edgegen.errors import UsageError
from edgegen.students.load import load
from edgegen.students.schedulers import sampler_from
from edgegen.students.source import Source
from edgegen.students.timesteps import parse_timesteps, with_timesteps

diffusers = pytest.importorskip("diffusers")
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def network(x, t):
    return torch.tanh(x * 0.7 + x.flip(-1) * 0.2) + t / 2000


def sampled(shapes, scheduler):
    """The shipped student with the sampler of another."""
    sampler = sampler_from(json.loads(scheduler.to_json_string()), "scheduler_config.json")
    return type(shapes)(shapes.config.model_copy(update={"sampler": sampler}), shapes.components, shapes.tokenizer_json)


@pytest.mark.parametrize("times", [[999, 749, 499, 249], [800], [399]], ids=["DMD2", "Hyper-SDXL", "DMD2 in one"])
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.LCMScheduler(**VP),
        diffusers.TCDScheduler(**VP),
        diffusers.EulerDiscreteScheduler(**VP, timestep_spacing="trailing"),
        diffusers.EulerDiscreteScheduler(**VP, timestep_spacing="leading"),
    ],
    ids=lambda one: f"{type(one).__name__}-{one.config.timestep_spacing}",
)
def test_given_times_are_diffusers_own(shapes, scheduler, times):
    student = with_timesteps(sampled(shapes, scheduler), [tuple(map(float, times))])
    sampler = student.config.sampler
    assert list(sampler.times) == [len(times)] and sampler.default_steps == len(times)
    scheduler.set_timesteps(timesteps=times)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs, generator = start * scheduler.init_noise_sigma, torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        said = network(scheduler.scale_model_input(theirs, t), float(t))
        extra = {"eta": 0.0} if isinstance(scheduler, diffusers.TCDScheduler) else {"generator": generator}
        theirs = scheduler.step(said, t, theirs, **extra).prev_sample
    ours, generator = start, torch.Generator().manual_seed(7)
    for step in sampler.table(len(times)):
        ours = step.sample * ours + step.prediction * network(step.input_scale * ours, step.timestep)
        if step.noise:
            ours = ours + step.noise * torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(ours, theirs.double(), atol=2e-3, rtol=2e-4)


def test_times_of_a_flow_are_a_thousand_sigmas(shapes):
    student = with_timesteps(sampled(shapes, diffusers.FlowMatchEulerDiscreteScheduler()), [(1000.0, 600.0), (1000.0,)])
    assert student.config.sampler.times == {2: (1.0, 0.6), 1: (1.0,)}
    assert student.config.sampler.default_steps == 2
    assert [step.timestep for step in student.config.sampler.table(2)] == [1000.0, 600.0]


@pytest.mark.parametrize(
    "text", ["", "999;749", "249,999", "999,999", "nan", "999,", ",".join(map(str, range(99, 9, -1)))]
)
def test_what_is_no_list_of_times_is_refused(text):
    with pytest.raises(UsageError) as caught:
        parse_timesteps(text)
    assert "--timesteps 999,749,499,249" in caught.value.hint


@pytest.mark.parametrize(
    ("scheduler", "rows", "said"),
    [
        (diffusers.LCMScheduler(), [(1000.0, 10.0)], "1000"),
        (diffusers.LCMScheduler(), [(999.0, 10.0)], "10 is not"),
        (diffusers.LCMScheduler(), [(999.5,)], "999.5"),
        (diffusers.LCMScheduler(), [(999.0,), (800.0,)], "two lists of 1"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), [(1200.0,)], "1200"),
        (diffusers.SCMScheduler(), [(1.0,)], "angles"),
        (diffusers.EulerDiscreteScheduler(**VP), [(999.0, 499.0), (800.0,)], "one start"),
    ],
)
def test_times_that_the_scheduler_has_not_are_refused(shapes, scheduler, rows, said):
    with pytest.raises(UsageError, match=said) as caught:
        with_timesteps(sampled(shapes, scheduler), rows)
    assert caught.value.hint


def test_the_option_is_packed_into_the_student(tmp_path, capsys):
    path = tmp_path / "m.pt"
    assert main(["student", "pack", "--timesteps", "1000,700,300", "--timesteps", "1000", "-o", str(path)]) == 0
    sampler = load(path).config.sampler
    assert sorted(sampler.times) == [1, 3] and sampler.default_steps == 3
    assert Source(timesteps=("900",)).open(path).config.sampler.times == {1: (0.9,)}
    assert main(["inspect", str(path), "--timesteps", "high"]) == 2
    assert "`high` is not a list of timesteps" in capsys.readouterr().err
