"""Repairs in a plan: what they bring, what they leave, and the two files that a build reads."""

import re

import pytest
import torch

from edgegen.cache import Cache
from edgegen.errors import EdgegenError, UsageError
from edgegen.precision.file import PlanFileError, load_plan, write_plan
from edgegen.precision.mend import Mended, Mender
from edgegen.precision.options import PlanOptions
from edgegen.precision.planner import make_plan, read_plan, write_planned
from edgegen.precision.repair.tensors import apply, load, tensors_of
from edgegen.targets import load_target

QUICK = {"samples": 2, "judged": 6, "projections": 1, "confirmed": 1, "spread": 2}


class Lines:
    def __init__(self):
        self.stages = []

    def stage(self, name, total):
        self.stages.append(name)

    def advance(self): ...

    def note(self, text): ...


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def plan_with(tiny, tiny_programs, cache):
    def make(**options):
        asked = PlanOptions(**QUICK, precisions=("w8a8",), max_size_ratio=0.4, **options)
        return make_plan(tiny, load_target("linux-x86"), ("onnx",), asked, cache, Lines(), tiny_programs)

    return make


@pytest.fixture(scope="module")
def planned(plan_with):
    return plan_with(repairs=True)


@pytest.fixture(scope="module")
def written(planned, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "tiny.plan.toml"
    write_planned(path, planned)
    return path


def test_repairs_bring_the_picture_nearer(planned, plan_with):
    said = planned.plan.predicted
    assert said["picture_psnr_db"] > said["picture_psnr_db_unrepaired"]
    assert "round-weights" in planned.plan.repairs and planned.tensors
    without = plan_with(repairs=False)
    assert said["bytes"] == without.plan.predicted["bytes"] and without.plan.tensors_sha256 is None
    assert not without.tensors and without.repairs == ()


def test_each_says_what_it_did_or_why_it_did_nothing(planned):
    names = {one.name for one in planned.repairs}
    assert {"equalise", "round-weights", "bias-correction", "q-sched", "picture"} <= names
    for one in planned.repairs:
        assert one.changed or one.reason
    for one in planned.repairs:
        if one.changed and one.before_db is not None:
            assert one.after_db > one.before_db
    (whole,) = (one for one in planned.repairs if one.name == "picture")
    assert whole.after_db >= whole.before_db
    assert re.search(r"round-weights, \w+: [\d.]+ -> [\d.]+ dB, \d+ changed", "\n".join(map(str, planned.repairs)))


def test_the_predicted_picture_is_that_of_the_two_files(planned, written, tiny, tiny_programs):
    """Measured again on what was written; and each component is that near as the graphs that builds read it into."""
    from edgegen.graph.count import count
    from edgegen.graph.evaluate import evaluate
    from edgegen.precision.budget import psnr
    from edgegen.precision.panel import panel
    from edgegen.precision.pictures import Pictures
    from edgegen.precision.prompts import prompts_for
    from edgegen.precision.reference import fake_quantized
    from edgegen.precision.simulate import Drawing, Network
    from edgegen.precision.sites import sites
    from edgegen.verify.metrics import sqnr_db

    plan = read_plan(written, tiny, load_target("linux-x86"), tiny_programs)
    tensors = {}
    for name, tensor in load(tensors_of(written, plan), plan.tensors_sha256).items():
        component, _, rest = name.partition("/")
        tensors.setdefault(component, {})[rest] = tensor
    networks = {name: Network(name, one, sites(one)) for name, one in tiny_programs.items()}
    drawing = Drawing(tiny, Mended(tensors).networks(networks), plan.sampler)
    default = tiny.config.sampler.default_steps
    others = [one for one in sorted(tiny.config.sampler.times) if one != default]
    ids = torch.cat([tiny.tokenize([one]) for one in prompts_for(tiny)[-QUICK["judged"] - 1 :]])
    macs = {name: count(one.program).macs for name, one in networks.items()}
    judges = panel(tiny, ids, default, others, macs, PlanOptions().seed, QUICK["judged"])
    ops = {name: part.ops for name, part in plan.components.items()}
    judged = Pictures(drawing, (), truth=Drawing(tiny, networks), panel=judges).judged(ops)
    assert judged.conditioning == pytest.approx(plan.predicted["conditioning_change"], rel=0.01)
    found = psnr(judged.psnr_loss)
    assert found == pytest.approx(plan.predicted["picture_psnr_db"], abs=0.01)

    torch.manual_seed(0)
    given = {"latent": torch.randn(1, 4, 8, 8)}
    (name,) = drawing.networks["decoder"].inputs
    (wanted,) = evaluate(tiny_programs["decoder"], {name: given["latent"]})
    plain, mended = (
        evaluate(
            fake_quantized(apply(tiny_programs["decoder"], made), plan.components["decoder"]), {name: given["latent"]}
        )[0]
        for made in ({}, tensors["decoder"])
    )
    assert not torch.equal(plain, mended)
    assert sqnr_db(wanted.numpy(), mended.numpy()) > 25.0


def test_what_was_repaired_is_not_repaired_again(plan_with, cache, planned):
    before = cache.statistics.built
    again = plan_with(repairs=True)
    assert cache.statistics.built == before
    assert again.plan == planned.plan and again.repairs == planned.repairs
    assert all(torch.equal(one, planned.tensors[name]) for name, one in again.tensors.items())


def test_the_same_everywhere(planned, tiny, tiny_programs, tmp_path):
    asked = PlanOptions(**QUICK, precisions=("w8a8",), max_size_ratio=0.4, repairs=True)
    other = make_plan(
        tiny, load_target("linux-x86"), ("onnx",), asked, Cache(tmp_path / "cache"), Lines(), tiny_programs
    )
    assert other.plan == planned.plan


def test_the_tensors_lie_beside_the_plan(planned, written, tmp_path):
    assert load_plan(written) == planned.plan
    beside = tensors_of(written, planned.plan)
    assert beside == written.with_suffix(".safetensors")
    assert set(load(beside, planned.plan.tensors_sha256)) == set(planned.tensors)
    alone = tmp_path / "alone.toml"
    alone.write_bytes(written.read_bytes())
    with pytest.raises(UsageError, match="made with repairs, whose tensors are not beside it") as caught:
        tensors_of(alone, load_plan(alone))
    assert "keep the two files together" in caught.value.hint
    alone.with_suffix(".safetensors").write_bytes(beside.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(EdgegenError, match="is not the file that the plan was made with"):
        load(alone.with_suffix(".safetensors"), planned.plan.tensors_sha256)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({3: ((1.0, 1.0),) * 3}, "the student does not draw in 3 steps"),
        ({2: ((1.0, 1.0),)}, "has 1 pairs of factors for 2 steps"),
        ({1: ((1.0, 40.0),)}, "a factor is not near 1"),
    ],
)
def test_factors_that_do_not_fit_are_refused(planned, tiny, tiny_programs, tmp_path, factors, message):
    path = tmp_path / "plan.toml"
    write_plan(path, planned.plan.model_copy(update={"sampler": factors}))
    with pytest.raises(PlanFileError, match=message):
        read_plan(path, tiny, load_target("linux-x86"), tiny_programs)


def test_what_has_nothing_to_learn_from_is_left(tiny):
    from dataclasses import replace

    assert "at least 4" in Mender.refusal(tiny, ("one", "two", "three"))
    assert Mender.refusal(tiny, ("one", "two", "three", "four")) is None
    single = replace(tiny, config=tiny.config.model_copy(update={"sampler": None}))
    assert "no trajectory" in Mender.refusal(single, ("one", "two", "three", "four"))


def test_none_of_the_prompts_that_judge_is_learned_from(tiny, monkeypatch, tiny_programs, tmp_path):
    seen = {}
    monkeypatch.setattr(Mender, "equalised", lambda self: seen.update(prompts=self.prompts) or Mended({}), raising=True)
    monkeypatch.setattr(Mender, "mended", lambda self, plans, equal: equal, raising=True)
    asked = PlanOptions(**QUICK, precisions=("w8a8",), max_size_ratio=0.4, repairs=True)
    make_plan(tiny, load_target("linux-x86"), ("onnx",), asked, Cache(tmp_path), Lines(), tiny_programs)
    from edgegen.precision.prompts import prompts_for

    assert len(seen["prompts"]) > 20
    assert not set(seen["prompts"]) & set(prompts_for(tiny)[-QUICK["samples"] - 1 :])
