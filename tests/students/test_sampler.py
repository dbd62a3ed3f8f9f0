import math

import numpy as np
import pytest
from pydantic import ValidationError

from edgegen.students.sampler import SamplerConfig, SamplerStep, moment


def sdxs(**changes):
    fields = dict(scheduler="ddim", prediction_type="epsilon", times={1: (999,)}, default_steps=1, final_alpha="first")
    return SamplerConfig(**{**fields, **changes})


def test_sdxs_one_step_algebra_comes_out_of_its_scheduler():
    (step,) = sdxs().table(1)
    assert step.timestep == 999
    assert step.sample == pytest.approx(14.642586, abs=2e-5)
    assert step.prediction == pytest.approx(-14.579274, abs=2e-5)


def test_ending_at_x0_gives_the_other_published_pair():
    (step,) = sdxs(final_alpha="one").table(1)
    assert step.sample == pytest.approx(14.648814, abs=2e-5)
    assert step.prediction == pytest.approx(-14.614641, abs=2e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction_lands_on_the_exact_trajectory(prediction_type):
    config = sdxs(prediction_type=prediction_type, times={4: (999, 749, 499, 249)}, default_steps=4, final_alpha="one")
    bars = config.alpha_bars()
    x0, eps = 0.7, -1.3
    x = math.sqrt(bars[999]) * x0 + math.sqrt(1 - bars[999]) * eps
    for step, end in zip(config.table(4), (bars[749], bars[499], bars[249], 1.0), strict=True):
        now = bars[int(step.timestep)]
        said = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": math.sqrt(now) * eps - math.sqrt(1 - now) * x0,
        }[prediction_type]
        x = step.sample * x + step.prediction * said
        assert x == pytest.approx(math.sqrt(end) * x0 + math.sqrt(1 - end) * eps, abs=1e-9)
    assert x == pytest.approx(x0, abs=1e-9)


def test_lcm_jumps_to_x0_and_adds_fresh_noise():
    config = sdxs(scheduler="lcm", times={2: (999, 499)}, default_steps=2, final_alpha="one")
    first, last = config.table(2)
    bar = config.alpha_bars()[499]
    assert first.noise == pytest.approx(math.sqrt(1 - bar))
    assert last.noise == 0
    (jump,) = sdxs(final_alpha="one").table(1)
    assert first.sample == pytest.approx(math.sqrt(bar) * jump.sample)


def test_flow_matching_walks_straight_to_the_data():
    config = SamplerConfig(
        scheduler="flow_match_euler", prediction_type="velocity", times={4: (1.0, 0.75, 0.5, 0.25)}, default_steps=4
    )
    noise, data = 2.0, -0.5
    x = noise
    for step in config.table(4):
        x = step.sample * x + step.prediction * (noise - data)
    assert x == pytest.approx(data)
    assert [step.timestep for step in config.table(4)] == [1000, 750, 500, 250]


@pytest.mark.parametrize(
    "changes",
    [
        {"default_steps": 2},
        {"times": {2: (999,)}, "default_steps": 2},
        {"times": {2: (499, 999)}, "default_steps": 2},
        {"prediction_type": "velocity"},
        {"scheduler": "flow_match_euler"},
        {"unknown": 1},
    ],
)
def test_contradictions_are_refused(changes):
    with pytest.raises(ValidationError):
        sdxs(**changes)


def test_every_timestep_of_every_count_is_listed_once_and_steps_point_at_theirs():
    times = {1: (1.0,), 2: (1.0, 0.5), 4: (1.0, 0.75, 0.5, 0.25)}
    config = SamplerConfig(scheduler="flow_match_euler", prediction_type="velocity", times=times, default_steps=4)
    assert config.timesteps() == (1000.0, 750.0, 500.0, 250.0)
    assert [step.index for step in config.table(2)] == [0, 2]
    for count in times:
        assert [config.timesteps()[step.index] for step in config.table(count)] == [
            step.timestep for step in config.table(count)
        ]


def test_a_denoiser_is_told_the_time_in_the_form_that_it_takes():
    step = SamplerStep(timestep=750.0, sample=1.0, prediction=-0.25, index=1)
    assert moment(step, {"latent", "context"}) == {}
    (time,) = moment(step, {"latent", "timestep", "context"}).values()
    assert time.tolist() == [750.0] and time.dtype == np.float32
    (index,) = moment(step, {"latent", "step", "context"}).values()
    assert index.tolist() == [1] and index.dtype == np.int32
