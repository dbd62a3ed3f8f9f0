"""The shipped student with planted outlier channels: what naive whole-int8 loses of its pictures, a plan keeps."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgegen.cache import Cache
from edgegen.precision.budget import psnr
from edgegen.precision.canonical import canonical_programs
from edgegen.precision.mend import Mended
from edgegen.precision.options import PlanOptions
from edgegen.precision.pictures import Pictures, Sample
from edgegen.precision.planner import make_plan
from edgegen.precision.prompts import prompts_for
from edgegen.precision.simulate import Drawing, Network
from edgegen.precision.sites import sites
from edgegen.targets import load_target
from tests.silent import Silent

sys.path.append(str(Path(__file__).parents[2] / "tools"))


@pytest.fixture(scope="module")
def outliers(shapes):
    """At one step alone, which is a seventh of the calls."""
    from plan_subjects import planted

    sampler = shapes.config.sampler.model_copy(
        update={"times": {1: shapes.config.sampler.times[1]}, "default_steps": 1}
    )
    return replace(planted(shapes), config=shapes.config.model_copy(update={"sampler": sampler}))


def test_the_planted_student_draws_the_same(shapes, outliers):
    from edgegen.students.sample import draw

    ours, theirs = (draw(one, ["a red circle"], [3], 1) for one in (shapes, outliers))
    assert (ours - theirs).abs().max() < 1e-3
    ours, theirs = (one.components["decoder"].module.state_dict() for one in (shapes, outliers))
    assert (theirs["layers.2.conv.0.weight"][5] / ours["layers.2.conv.0.weight"][5]).median() == pytest.approx(100)


def test_a_plan_keeps_what_naive_int8_loses(outliers, tmp_path):
    from plan_subjects import naive

    programs = canonical_programs(outliers)
    networks = {name: Network(name, one, sites(one)) for name, one in programs.items()}
    cache = Cache(tmp_path / "cache")
    prompts = prompts_for(outliers)
    few = tmp_path / "prompts.txt"
    few.write_text("\n".join((*prompts[:8], *prompts[-2:])))
    options = PlanOptions(
        calibration=few,
        samples=1,
        projections=1,
        confirmed=1,
        spread=2,
        repairs=True,
        max_size_ratio=0.30,
        aim="latency",
    )
    made = make_plan(outliers, load_target("linux-x86"), ("onnx",), options, cache, Silent(), programs)
    assert any(one.name == "equalise" and one.changed for one in made.repairs)

    tensors = {}
    for name, tensor in made.tensors.items():
        component, _, rest = name.partition("/")
        tensors.setdefault(component, {})[rest] = tensor
    floats = Drawing(outliers, networks)
    ids = [outliers.tokenize([one]) for one in prompts[-4:]]
    samples = tuple(Sample(one, 2000 + index, one, 1) for index, one in enumerate(ids))
    ours = Drawing(outliers, Mended(tensors).networks(networks), made.plan.sampler)
    plans = {name: part.ops for name, part in made.plan.components.items()}
    theirs, whole = naive(outliers, networks, cache)
    kept = psnr(Pictures(ours, samples, truth=floats).loss(plans))
    lost = psnr(Pictures(Drawing(outliers, theirs), samples, truth=floats).loss(whole))
    assert kept >= 30.0 and kept >= lost + 8.0, (kept, lost)
    assert made.plan.predicted["bytes_ratio"] <= 0.30
