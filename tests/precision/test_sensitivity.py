"""The estimate of what a precision does, against what it does."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from edgegen.graph.evaluate import evaluate
from edgegen.precision.calibrate import calibrate
from edgegen.precision.calls import Calls
from edgegen.precision.canonical import canonical_programs
from edgegen.precision.pictures import Pictures, Sample
from edgegen.precision.plan import ComponentPlan, OpPlan
from edgegen.precision.prompts import default_settings, prompts_for
from edgegen.precision.reference import fake_quantized
from edgegen.precision.sensitivity import confirm, estimate
from edgegen.precision.simulate import Drawing, Network
from edgegen.precision.sites import sites


@pytest.fixture(scope="module")
def networks(tiny):
    return {name: Network(name, one, sites(one)) for name, one in canonical_programs(tiny).items()}


@pytest.fixture(scope="module")
def options(tiny, networks):
    """Every precision of every op that has a weight, with ranges."""
    programs = {name: network.program for name, network in networks.items()}
    found = calibrate(tiny, programs, prompts_for(tiny)[:8], default_settings(), [2])
    made = {}
    for name, network in networks.items():
        for key, site in network.sites.items():
            seen = found.components[name][key]
            facts = {"op": site.kind, "input": seen.input, "output": seen.output}
            made[name, key] = tuple(OpPlan(precision=one, **facts) for one in ("w8a8", "w8a8-dynamic", "w8", "w4"))
    return made


@pytest.fixture(scope="module")
def pictures(tiny, networks):
    ids = tiny.tokenize(list(prompts_for(tiny)[-4:]))
    samples = tuple(Sample(ids[i][None], i, ids[(i + 1) % 4][None], 2) for i in range(3))
    return Pictures(Drawing(tiny, networks), samples, projections=8)


@pytest.fixture(scope="module")
def effects(pictures, options):
    return estimate(pictures, options)


def test_the_float_picture_is_the_student_s_own(tiny, pictures):
    from edgegen.students.sample import draw

    prompt = prompts_for(tiny)[0]
    own = draw(tiny, [prompt], [5], 2)
    torch.testing.assert_close(pictures.drawing.draw(tiny.tokenize([prompt]), 5, 2).image, own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", range(4))
def test_what_is_simulated_is_what_the_quantized_graph_computes(networks, options, place):
    network = networks["decoder"]
    ops = {key: made[place] for (name, key), made in options.items() if name == "decoder"}
    given = {network.inputs[0]: torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
    (expected,) = evaluate(fake_quantized(network.program, ComponentPlan(float_precision="fp32", ops=ops)), given)
    with torch.no_grad():
        (found,) = network(given, network.changes(ops))
    assert torch.equal(found, expected)


def measured(pictures, options, keys):
    return [pictures.loss({name: {key: options[name, key][place]}}) for (name, key), place in keys]


def test_estimates_rank_as_measurements_do(pictures, options, effects):
    keys = [(key, place) for number, key in enumerate(options) for place in [number % 4]]
    guessed = [effects[key][place].picture for key, place in keys]
    found = measured(pictures, options, keys)
    assert spearmanr(guessed, found).statistic >= 0.8
    near = [abs(math.log10(a / b)) < 0.5 for a, b in zip(guessed, found, strict=True) if b > 0]
    assert np.mean(near) > 0.8


def test_errors_that_are_seen_by_prompts_alone_are_told_apart(pictures, options, effects):
    keys = [("denoiser", key) for name, key in options if name == "denoiser"][::2]
    guessed = [math.sqrt(effects[key][3].conditioning) for key in keys]
    found = [pictures.conditioning({name: {key: options[name, key][3]}}) for name, key in keys]
    assert spearmanr(guessed, found).statistic >= 0.8
    assert all(one.conditioning == 0.0 for key, made in effects.items() if key[0] == "decoder" for one in made)


def test_errors_of_several_ops_add_up(pictures, options, effects):
    chosen = {key: made[2] for key, made in options.items()}
    plans = {}
    for (name, key), op in chosen.items():
        plans.setdefault(name, {})[key] = op
    together = pictures.loss(plans)
    assert 0.3 < sum(effects[key][2].picture for key in chosen) / together < 3.0


def test_floats_change_nothing(pictures, options):
    key = next(iter(options))
    op = options[key][0].model_copy(update={"precision": "fp32"})
    assert pictures.loss({key[0]: {key[1]: op}}) == 0.0


def test_the_top_of_the_list_is_measured(pictures, options, effects):
    few = {key: made for number, (key, made) in enumerate(options.items()) if number % 6 == 0}
    known = {key: effects[key] for key in few}
    confirmed = confirm(pictures, few, known, top=3, spread=3)
    assert len(confirmed.measured) == 6
    first = max(((key, i) for key in few for i in range(4)), key=lambda one: known[one[0]][one[1]].picture)
    assert first in confirmed.measured
    assert confirmed.effects[first[0]][first[1]].picture == confirmed.measured[first][1]


def test_a_network_alone_is_judged_by_its_outputs(networks, options):
    network = networks["decoder"]
    given = {network.inputs[0]: torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
    calls = Calls({"decoder": network}, (("decoder", given),), projections=16)
    own = {key: made for key, made in options.items() if key[0] == "decoder"}
    found = estimate(calls, own)
    keys = [(key, place) for key in own for place in range(4)]
    guessed = [found[key][place].picture for key, place in keys]
    true = [calls.loss({name: {key: own[name, key][place]}}) for (name, key), place in keys]
    assert spearmanr(guessed, true).statistic >= 0.8
