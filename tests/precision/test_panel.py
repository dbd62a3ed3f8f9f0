"""What a plan is judged by: other prompts than those that builds are judged on, in the way that gates do."""

import pytest
import torch

from edgegen.graph.count import count
from edgegen.precision.panel import panel
from edgegen.precision.pictures import moved
from edgegen.precision.plan import OpPlan
from edgegen.precision.prompts import prompts_for
from edgegen.precision.simulate import Drawing, Network
from edgegen.precision.sites import sites
from edgegen.verify.gates import default_gates, least_heard, sensitivity_met
from edgegen.verify.metrics import sensitivity
from edgegen.verify.outcome import SensitivityStep


@pytest.fixture(scope="module")
def networks(tiny, tiny_programs):
    return {name: Network(name, one, sites(one)) for name, one in tiny_programs.items()}


def judges(tiny, networks, most, macs=None):
    known = {name: count(one.program).macs for name, one in networks.items()}
    ids = torch.cat([tiny.tokenize([one]) for one in prompts_for(tiny)[-5:]])
    return panel(tiny, ids, 2, [1], macs or known, 7, most)


def test_pairs_are_of_different_prompts_and_different_noise(tiny, networks):
    made = judges(tiny, networks, 12)
    assert len(made.pairs) == 12 and len({one.seed for one in made.pairs}) == 12
    assert all(not torch.equal(one.ids, one.other_ids) for one in made.pairs)
    together = {(tuple(one.ids[0].tolist()), tuple(one.other_ids[0].tolist())) for one in made.pairs}
    assert len(together) == 12
    assert {one.steps for one in made.pairs} == {2} and {one.steps for one in made.pictures} == {1, 2}
    assert made.unseen_pairs == len(tiny.config.example_prompts) and made.unseen_pictures[1] == 1


def test_a_large_student_has_fewer(tiny, networks):
    large = {"text_encoder": 10**9, "denoiser": 180 * 10**9, "decoder": 10**11}
    assert len(judges(tiny, networks, 32, large).pairs) == 4


def test_a_plan_is_judged_as_its_gate_would_on_each_pair(tiny, networks):
    """The worst of the steps of all pairs is what the gate says of that step, and the bound is not below."""
    made = judges(tiny, networks, 4)
    drawing = Drawing(tiny, networks)
    plans = {
        "denoiser": {
            key: OpPlan(precision="w4", op=site.kind) for key, site in networks["denoiser"].sites.items() if site.weight
        }
    }
    found = made.judged(drawing, drawing, plans)
    assert 0 < found.conditioning <= found.conditioning_most and found.pairs == 4
    assert 0 < found.psnr_loss <= found.psnr_loss_most
    gate = default_gates().sqnr_db["plan"]
    changes = {name: networks[name].changes(ops) for name, ops in plans.items()}

    def met(tolerance):
        for one in made.pairs:
            drawn = drawing.draw(one.ids, one.seed, one.steps)
            answers = [drawing.answers(drawn, ids, by) for by in (None, changes) for ids in (one.ids, one.other_ids)]
            for step in zip(*answers, strict=True):
                said = sensitivity(*(value.numpy() for value in step))
                names = ("reference_std", "compiled_std", "output_std", "ratio", "cosine", "degenerate")
                record = SensitivityStep(
                    prompt_a="a", prompt_b="b", step=1, steps=2, **{name: getattr(said, name) for name in names}
                )
                if not sensitivity_met(record, tolerance, gate):
                    return False
        return True

    # What counts as little depends on the tolerance: judged at its own.
    exact = judges(tiny, networks, 4)
    for tolerance in (found.conditioning * 1.2, found.conditioning * 0.8):
        at = max(
            moved(
                [drawing.answers(drawing.draw(one.ids, one.seed, 2), ids) for ids in (one.ids, one.other_ids)],
                [drawing.answers(drawing.draw(one.ids, one.seed, 2), ids, changes) for ids in (one.ids, one.other_ids)],
                tolerance,
            )
            for one in exact.pairs
        )
        assert met(tolerance) == (at <= tolerance)


def step(reference, compiled, cosine=1.0, output=1.0):
    ratio = compiled / reference
    return SensitivityStep(
        prompt_a="a",
        prompt_b="b",
        step=1,
        steps=1,
        reference_std=reference,
        compiled_std=compiled,
        output_std=output,
        ratio=ratio,
        cosine=cosine,
        degenerate=False,
    )


@pytest.mark.parametrize("reference", [0.08, 0.3, 1.4])
def test_where_a_prompt_moves_much_the_gate_is_the_ratio_itself(reference):
    for ratio, cosine, met in [(0.951, 1, True), (0.949, 1, False), (1.049, 1, True), (1.06, 1, False), (1, -1, False)]:
        assert sensitivity_met(step(reference, ratio * reference, cosine), 0.05, 35.0) is met
    assert not sensitivity_met(step(reference, reference, 0.94), 0.05, 35.0)


def test_where_it_moves_little_noise_that_another_gate_allows_is_not_held_against_it():
    """0.3 % of the answer, as an untrained student's last step: rounding of 46 dB makes that half as much again."""
    noise = 2**0.5 * 10 ** (-46 / 20)
    moved_by = (0.003**2 + noise**2) ** 0.5
    assert moved_by / 0.003 > 2.5  # the ratio, which says nothing about prompts here
    assert sensitivity_met(step(0.003, moved_by, 0.003 / moved_by), 0.05, 35.0)
    assert least_heard(0.05, 35.0) == pytest.approx(0.0786, abs=1e-3)


@pytest.mark.parametrize(
    ("tolerance", "gate", "share"), [(0.05, 35.0, 0.0040), (0.02, 40.0, 0.0015), (0.02, 60.0, 2e-4)]
)
def test_one_that_ignores_the_prompt_fails_there_too(tolerance, gate, share):
    assert not sensitivity_met(step(share, 0.0, 0.0), tolerance, gate)
    assert not sensitivity_met(step(4 * share, 0.0, 0.0), tolerance, gate)
    assert not sensitivity_met(step(4 * share, 4 * share, -1.0), tolerance, gate)


def test_a_plan_that_is_plainly_outside_is_given_up_early_and_one_inside_never(tiny, networks):
    made = judges(tiny, networks, 16)
    drawing = Drawing(tiny, networks)
    sites = networks["denoiser"].sites
    plans = {"denoiser": {key: OpPlan(precision="w4", op=one.kind) for key, one in sites.items() if one.weight}}
    whole = made.judged(drawing, drawing, plans)
    assert whole.pairs == 16
    early = made.judged(drawing, drawing, plans, allowed=whole.conditioning / 10)
    assert early.pairs == 4 and early.conditioning <= whole.conditioning
    assert early.conditioning_most > whole.conditioning / 10
    assert made.judged(drawing, drawing, plans, allowed=3 * whole.conditioning_most) == whole
