"""Q-Sched: a schedule learned for a denoiser that is a little off, on the tiny student."""

import pytest
import torch

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.capture import capture
from edgegen.graph.evaluate import evaluate
from edgegen.precision.plan import OpPlan
from edgegen.precision.quantize import on_grid
from edgegen.precision.repair.q_sched import applied, learn
from edgegen.precision.sites import sites
from edgegen.students.sample import sampler_table

PROMPTS = 8


@pytest.fixture(scope="module")
def given(tiny):
    """The float denoiser, and contexts of prompts that differ."""
    module = tiny.components["denoiser"].module.eval()
    contexts = list(torch.randn((PROMPTS, 1, 16, 32), generator=torch.Generator().manual_seed(2)))

    def denoiser(x, step, context):
        with torch.no_grad():
            return module(x, torch.tensor([step.timestep]), context)

    return denoiser, contexts


def test_what_a_weak_denoiser_leaves_out_is_found_exactly(tiny, given):
    denoiser, contexts = given
    found = learn(tiny, denoiser, lambda x, step, context: 0.9 * denoiser(x, step, context), contexts, 2)
    for sample, prediction in found.factors:
        assert sample == pytest.approx(1.0, abs=0.01) and prediction == pytest.approx(1 / 0.9, abs=0.02)
    assert found.after_db > found.before_db + 15


def test_errors_of_the_denoiser_before_are_made_good_by_the_sample(tiny, given):
    """What the second step is given has the first one's error in it, which it cannot see in its own prediction."""
    denoiser, contexts = given

    def off(x, step, context):
        return denoiser(x, step, context) * (0.97 if step.index else 1.04)

    found = learn(tiny, denoiser, off, contexts, 2, held_out=3)
    assert found.after_db > found.before_db + 6
    again = learn(tiny, denoiser, off, contexts, 2, held_out=3)
    assert again == found


def test_the_shipped_student_in_four_bits_lands_nearer(shapes):
    """Its denoiser with weights of four bits; the prompts that judge are not those that are learned from."""
    program = capture(shapes.components["denoiser"])
    module = shapes.components["denoiser"].module.eval()
    ids = shapes.tokenize(["a small red circle", "a large green triangle", "a small blue square", "a large red square"])
    with torch.no_grad():
        contexts = list(shapes.components["text_encoder"].module(ids)[:, None])
    steps = min(count for count in shapes.config.sampler.times if count > 1)
    ops = {
        site.node: OpPlan(op=site.kind, precision="w4") for site in sites(program).values() if site.weight is not None
    }
    graph = on_grid(program, ops)

    def exact(x, step, context):
        with torch.no_grad():
            return module(x, torch.tensor([step.timestep]), context)

    def coarse(x, step, context):
        return evaluate(graph, {"latent": x, "timestep": torch.tensor([step.timestep]), "context": context})[0]

    found = learn(shapes, exact, coarse, contexts, steps)
    assert len(found.factors) == steps, found.reason
    assert found.after_db > found.before_db + 0.1


def test_a_schedule_that_makes_other_prompts_worse_is_refused(tiny, given):
    denoiser, contexts = given
    held = {context.sum().item() for context in contexts[-2:]}

    def fickle(x, step, context):
        return denoiser(x, step, context) * (1.1 if context.sum().item() in held else 0.9)

    found = learn(tiny, denoiser, fickle, contexts, 2)
    assert found.factors == () and found.after_db == found.before_db and "held out" in found.reason


def test_a_broken_denoiser_is_no_schedule(tiny, given):
    denoiser, contexts = given
    found = learn(tiny, denoiser, lambda x, step, context: 0.3 * denoiser(x, step, context), contexts, 2)
    assert found.factors == () and "broken" in found.reason


def test_bad_input(tiny, given):
    denoiser, contexts = given
    with pytest.raises(UsageError, match="too few"):
        learn(tiny, denoiser, denoiser, contexts[:3], 2)
    with pytest.raises(EdgegenError, match="NaN"):
        learn(tiny, denoiser, lambda x, step, context: denoiser(x, step, context) * float("nan"), contexts, 2)


def test_factors_go_into_the_table(tiny):
    table = sampler_table(tiny, 2)
    made = applied(table, ((1.1, 0.9), (1.0, 1.2)))
    assert [step.sample for step in made] == [1.1 * table[0].sample, table[1].sample]
    assert [step.prediction for step in made] == [0.9 * table[0].prediction, 1.2 * table[1].prediction]
    assert [step.noise for step in made] == [step.noise for step in table]
    assert applied(table, ()) == table
    with pytest.raises(UsageError, match="1 steps"):
        applied(table, ((1.0, 1.0),))
