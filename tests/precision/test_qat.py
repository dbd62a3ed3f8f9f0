"""Training of quantized weights: what it computes, what it brings, what is left when it is cut off or goes wrong."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from pydantic import ValidationError

from edgegen.cache import Cache
from edgegen.errors import EdgegenError
from edgegen.precision.encode import encode_weight
from edgegen.precision.options import PlanOptions
from edgegen.precision.plan import OpPlan, Range
from edgegen.precision.planner import make_plan, read_plan, write_planned
from edgegen.precision.prompts import prompts_for
from edgegen.precision.repair import qat, trained
from edgegen.precision.repair.lessons import Components, HeldBack, Judged, Trajectories
from edgegen.precision.repair.qat import Training
from edgegen.precision.repair.straight_through import Trainable, TrainedOp
from edgegen.precision.simulate import Drawing, Network
from edgegen.precision.sites import sites
from edgegen.targets import load_target

QUICK = {"samples": 2, "judged": 6, "projections": 1, "confirmed": 1, "spread": 2}
WIDE = Range(low=-4.0, high=4.0)
FORMS = {
    "w8a8": {"precision": "w8a8", "input": WIDE, "other": WIDE, "output": Range(low=-6.0, high=6.0)},
    "w8a8-dynamic": {"precision": "w8a8-dynamic"},
    "w8": {"precision": "w8"},
    "w4 groups": {"precision": "w4", "group": 8},
    "w4 palette": {"precision": "w4", "form": "palette"},
    "w6 palettes": {"precision": "w6", "form": "palette", "group": 4},
}


class Lines:
    def __init__(self):
        self.stages, self.notes, self.ticks = [], [], 0

    def stage(self, name, total):
        self.stages.append(name)

    def advance(self):
        self.ticks += 1

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def networks(tiny_programs):
    return {name: Network(name, program, sites(program)) for name, program in tiny_programs.items()}


def ops(network, form):
    """Every op in one form, where it can have it."""
    made = {}
    for key, site in network.sites.items():
        fields = dict(FORMS[form])
        if site.kind == "matmul" and not fields["precision"].startswith("w8a8"):
            continue
        channels = site.shape[site.axis] if fields.get("form") == "palette" else site.shape[1 - site.axis]
        if channels % fields.get("group", 1):
            continue
        made[key] = OpPlan(op=site.kind, **fields)
    return made


@pytest.fixture(scope="module")
def palettes(networks):
    return {name: ops(network, "w4 palette") for name, network in networks.items()}


@pytest.fixture
def lessons(tiny, networks):
    ids = [tiny.tokenize([one]) for one in prompts_for(tiny)[:8]]
    drawing = Drawing(tiny, networks)
    return Trajectories(drawing, drawing, ids[:5], HeldBack(drawing, trained_samples(ids[5:])), 7)


def trained_samples(ids):
    from edgegen.precision.pictures import Sample

    return tuple(Sample(one, 100 + i, ids[i - 1], steps) for i, one in enumerate(ids) for steps in (1, 2))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_trained_computes_what_the_plan_says(networks, form):
    network = networks["denoiser"]
    plan = ops(network, form)
    torch.manual_seed(0)
    given = {"latent": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([499.0]), "context": torch.randn(1, 16, 32)}
    given = {name: given[name] if name in given else torch.zeros(1, dtype=torch.int32) for name in network.inputs}
    trainable = Trainable.of({"denoiser": network}, {"denoiser": plan})
    with torch.no_grad():
        (wanted,) = network(given, network.changes(plan))
        (exact,) = network(given)
        (made,) = network(given, trainable.changes()["denoiser"])
    assert not torch.equal(wanted, exact)
    assert float((made - wanted).norm() / (wanted - exact).norm()) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [0, 1])
def test_trained_weights_lie_on_the_grid_that_encoding_finds_again(form, axis):
    torch.manual_seed(1)
    op = OpPlan(op="conv", **FORMS[form])
    one = TrainedOp("conv", op, axis, torch.randn(16, 16, 3, 3), torch.randn(16))
    for value in one.parameters().values():
        value.add_(torch.randn(value.shape) * 0.05)
    made = one.tensors()
    assert torch.equal(encode_weight(made["conv:1"], op, axis).decode(), made["conv:1"])
    assert made["conv:1"].shape == (16, 16, 3, 3) and made["conv:2"].shape == (16,)
    settled = encode_weight(torch.randn(16, 16, 3, 3), op, axis).decode()
    assert made["conv:1"].unique().numel() <= settled.unique().numel() * 1.01


def test_gradients_pass_the_rounding():
    torch.manual_seed(2)
    weight, x = torch.randn(8, 8), torch.randn(5, 8)
    one = TrainedOp("fc", OpPlan(op="linear", **FORMS["w4 palette"]), 0, weight, torch.zeros(8))
    change = one.changed(training=True)
    torch.nn.functional.linear(x, change.weight, change.bias).square().sum().backward()
    one.collect()
    grid = change.weight.detach().requires_grad_()
    torch.nn.functional.linear(x, grid).square().sum().backward()
    found = one.parameters()
    torch.testing.assert_close(found["weight"].grad.view(8, 8), grid.grad)
    entries = found["table"][0]
    for place, entry in enumerate(entries):
        torch.testing.assert_close(found["table"].grad[0, place], grid.grad[grid == entry].sum())
    assert found["bias"].grad.abs().sum() > 0


def test_a_range_taken_when_met_passes_gradients(networks):
    from edgegen.precision.repair.straight_through import _passed

    x = torch.randn(4, 8, requires_grad=True)
    made = _passed(x, by_row=True)
    made.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 8)) and 0 < float((made - x).detach().abs().max()) < 0.05


def test_training_brings_held_back_pictures_nearer(networks, palettes, lessons):
    trainable = Trainable.of(networks, palettes)
    course = Training(trainable, lessons, 25).run()
    assert course.best[0] < course.before[0] * 0.98 and Judged(*course.best).score < Judged(*course.before).score
    assert len(course.judged) == 6 and course.judged[0][0] == 0
    # What was best is what is left, and what the plan's arithmetic makes of its tensors.
    from edgegen.precision.mend import Mended
    from edgegen.precision.pictures import Pictures

    made = Mended(trainable.tensors()).networks(networks)
    pictures = Pictures(Drawing(lessons.floats.student, made), lessons.held_back.samples, truth=lessons.floats)
    assert pictures.loss(palettes) == pytest.approx(course.best[0], rel=1e-3)
    # And so does the reference that builds are held against.
    from edgegen.graph.evaluate import evaluate
    from edgegen.precision.plan import ComponentPlan
    from edgegen.precision.reference import fake_quantized

    given = {networks["decoder"].inputs[0]: torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
    plan = ComponentPlan(float_precision="fp32", ops=palettes["decoder"])
    (reference,) = evaluate(fake_quantized(made["decoder"].program, plan), given)
    with torch.no_grad():
        (own,) = networks["decoder"](given, trainable.changes()["decoder"])
    torch.testing.assert_close(reference, own, atol=1e-5, rtol=1e-5)


def test_the_same_lesson_twice(networks, palettes, lessons):
    found = []
    for _ in range(2):
        trainable = Trainable.of(networks, palettes)
        loss = lessons.learn(3, trainable.changes(training=True))
        trainable.collect()
        found.append((loss, {name: value.grad for name, value in trainable.parameters().items()}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, found[1][1][name]) for name, one in found[0][1].items())
    silent = [name for name, one in found[0][1].items() if not one.any()]
    assert len(silent) < 0.1 * len(found[0][1]), silent


@pytest.fixture(scope="module")
def whole(tiny, networks, palettes, tmp_path_factory):
    """A function that trains the tiny student under palettes, and what plans are then measured at. Its decoder alone:
    what a prompt moves in the random denoiser, no dozen steps bring nearer on prompts that they did not see."""
    from edgegen.precision.budget import Budget, Measured
    from edgegen.precision.mend import Mender
    from edgegen.precision.options import Planned
    from edgegen.precision.plan import ComponentPlan, PrecisionPlan

    parts = {
        name: ComponentPlan(float_precision="fp32", ops=part if name == "decoder" else {})
        for name, part in palettes.items()
    }
    made = {
        "student": "tiny",
        "student_sha256": tiny.fingerprint,
        "target": "none",
        "target_sha256": "",
        "backends": (),
    }
    schedule = {2: ((1.0, 0.999), (1.0, 1.001))}
    plan = PrecisionPlan(**made, components=parts, sampler=schedule, repairs=("bias-correction", "q-sched"))
    cache, prompts = Cache(tmp_path_factory.mktemp("whole")), prompts_for(tiny)[:8]
    mender = Mender(tiny, networks, prompts, cache)

    def train(*measured, repairs=True, **budget):
        found = iter(Measured(*one) if isinstance(one, tuple) else Measured(one, 0.01) for one in measured)
        given = (lambda tensors: next(found)), Budget(**budget), mender if repairs else None
        return trained.Trainer(tiny, networks, prompts, cache, Lines(), *given).trained(Planned(plan, {}, None, 0), 15)

    return train


def test_a_student_that_draws_is_trained_and_its_schedule_learned_again(whole):
    planned = whole(30.0, 31.0)
    record = planned.repairs[-1]
    assert record.name == "qat" and record.after_db > record.before_db and record.changed
    line = f"qat: {record.where}, {record.before_db:.2f} -> {record.after_db:.2f} dB"
    learned = ("q-sched",) if planned.plan.sampler else ()
    assert planned.plan.repairs == ("bias-correction", line, *learned)
    assert planned.plan.sampler != {2: ((1.0, 0.999), (1.0, 1.001))}
    assert planned.plan.predicted == {
        "picture_psnr_db": 31.0,
        "picture_psnr_db_untrained": 30.0,
        "conditioning_change": 0.01,
    }
    assert {name.split("/")[0] for name in planned.tensors} == {"decoder"}
    without = whole(30.0, 31.0, repairs=False)
    assert not without.plan.sampler and "q-sched" not in without.plan.repairs


def test_training_that_misses_the_budget_is_left(whole):
    planned = whole(30.0, 29.0, psnr=29.5)
    assert not planned.tensors and planned.plan.sampler == {2: ((1.0, 0.999), (1.0, 1.001))}
    assert "with it the plan misses its budget: 30.0 dB" in planned.repairs[-1].reason


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((30.0, 0.02), (31.0, 0.021)),
        ((30.0, 0.02), (29.9, 0.01)),
        ((30.0, 0.02, None, 28.0, 0.03), (31.0, 0.01, None, 29.0, 0.031)),
        ((30.0, 0.02, None, 28.0, 0.03), (31.0, 0.01, None, 27.9, 0.02)),
        ((30.0, 0.02, 0.9), (31.0, 0.02, 0.89)),
    ],
)
def test_training_that_makes_anything_worse_is_left(whole, before, after):
    """Pictures nearer and a prompt heard worse, or the other way round: a budget that both keep does not excuse it."""
    planned = whole(before, after, psnr=20.0, conditioning=0.05)
    assert not planned.tensors and "it would make the plan worse: 30.0 dB" in planned.repairs[-1].reason


def test_what_spoils_a_judgement():
    before = Judged(1e-4, 0.02, 0.05)
    assert not Judged(1e-4, 0.02, 0.05).spoils(before) and not Judged(5e-5, 0.01, 0.04).spoils(before)
    assert "worst held-back prompt would go from 5.00% to 6.00%" in Judged(5e-5, 0.01, 0.06).spoils(before)
    assert "heard" in Judged(5e-5, 0.021, 0.05).spoils(before) and "farther" in Judged(2e-4, 0.0, 0.0).spoils(before)
    assert Judged(5e-5, 0.01, 0.06).score > Judged(1e-4, 0.02, 0.05).score > Judged(1e-4, 0.02, 0.04).score


def test_every_held_back_prompt_is_held_against_every_other(networks, palettes, lessons):
    """The worst is over all pairs at all steps, and no less than what one pair of each says."""
    held = lessons.held_back
    given = {name: network.changes(palettes[name]) for name, network in networks.items()}
    found = HeldBack(held.drawing, held.samples, given=given).judge()
    asked = [held._asked(place) for place in range(len(held.samples))]
    assert all(len(one) == 3 for one in asked)
    assert all(one[0].equal(sample.ids) for one, sample in zip(asked, held.samples, strict=True))
    pairs = [HeldBack(held.drawing, (one,), given=dict(given)).judge() for one in held.samples]
    assert 0 < max(one.worst for one in pairs) <= found.worst and found.heard < found.worst


def test_lessons_that_went_worst_are_repeated():
    course = qat.Course(hard=[(9.0, 4), (8.0, 0), (7.0, 2)])
    said = []
    for course.step in range(7, 15):
        said.append(qat._lesson(course))
    assert said == [4, 8, 0, 10, 2, 12, 13, 14], "new ones in turn with the worst, each of which has its rest"


class Counted:
    """Lessons that stop the run by a NaN, or just count."""

    def __init__(self, inner, broken=math.inf):
        self.inner, self.broken, self.count = inner, broken, 0

    def learn(self, index, changes):
        self.count += 1
        loss = self.inner.learn(index, changes)
        return math.nan if index >= self.broken else loss

    def judge(self, changes):
        return self.inner.judge(changes)


@pytest.fixture
def calls(networks):
    torch.manual_seed(3)
    only = {"decoder": networks["decoder"]}
    return Components(only, only, {"decoder": {networks["decoder"].inputs[0]: torch.randn(1, 4, 8, 8)}}, 11, 3)


@pytest.fixture
def decoder(networks, palettes):
    return lambda: Trainable.of({"decoder": networks["decoder"]}, {"decoder": palettes["decoder"]})


def test_not_a_number_ends_it_and_the_best_stays(decoder, calls):
    trainable = decoder()
    course = Training(trainable, Counted(calls, broken=12), 20).run()
    assert course.ended == "the loss is not finite at step 13" and course.step == 12 and course.best_step
    assert calls.judge(trainable.changes()).loss == pytest.approx(course.best[0], rel=1e-6)
    assert all(value.isfinite().all() for value in trainable.parameters().values())


def test_weights_that_run_away_are_not_kept(decoder, calls, monkeypatch):
    monkeypatch.setattr(qat, "RATE", 1e38)
    trainable = decoder()
    before = {name: value.clone() for name, value in trainable.parameters().items()}
    course = Training(trainable, calls, 20).run()
    assert "not finite" in course.ended and course.best_step == 0
    assert all(torch.equal(value, before[name]) for name, value in trainable.parameters().items())


def test_it_ends_where_nothing_gets_better(decoder, calls, monkeypatch):
    monkeypatch.setattr(qat, "RATE", 0.5)
    monkeypatch.setattr(qat, "JUDGED_EVERY", 2)
    trainable = decoder()
    course = Training(trainable, calls, 60).run()
    assert course.ended == "held-back prompts gained nothing since step 0" and course.step == 2 * qat.PATIENCE


def test_it_goes_on_where_it_was(decoder, calls, tmp_path, monkeypatch):
    """In one process, at every place; the next test kills one."""
    whole = decoder()
    course = Training(whole, calls, 15).run()
    for cut in (4, 9):
        state = tmp_path / f"{cut}.safetensors"

        class CutError(Exception): ...

        def stop(cut=cut, seen=[]):  # noqa: B006 - counts
            seen.append(1)
            if len(seen) == cut:
                raise CutError

        with pytest.raises(CutError):
            Training(decoder(), calls, 15, state, stop).run()
        again, counted = decoder(), Counted(calls)
        assert Training(again, counted, 15, state).run() == course
        assert counted.count == 15 - (cut - 1) // 3 * 3
        assert all(torch.equal(one, again.parameters()[name]) for name, one in whole.parameters().items())


def test_a_state_that_cannot_be_read_is_said(decoder, calls, tmp_path):
    state = tmp_path / "state.safetensors"
    state.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    with pytest.raises(EdgegenError, match="earlier run left of its training cannot be read") as caught:
        Training(decoder(), calls, 5, state).run()
    assert caught.value.hint == "`edgegen cache clean`"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A `.pt2` of one small network, and how it is planned."""
    from planted import network

    module, samples = network(width=8)
    path = tmp_path_factory.mktemp("single") / "net.pt2"
    torch.export.save(torch.export.export(module, (samples[0]["latent"],)), path)
    return path


STEPS = 120
CLI = "import sys; from edgegen.cli.main import main; sys.exit(main())"


def plan_of(path, cache, **options):
    from edgegen.students.load import load

    asked = PlanOptions(precisions=("w4",), max_size_ratio=0.2, repairs=True, **options)
    lines = Lines()
    return load(path), make_plan(load(path), load_target("iphone17"), ("coreml",), asked, Cache(cache), lines), lines


@pytest.fixture(scope="module")
def single(exported, tmp_path_factory):
    return plan_of(exported, tmp_path_factory.mktemp("cache"), qat=STEPS)


def test_a_network_that_is_called_alone_learns_from_noise(single, tmp_path):
    student, planned, lines = single
    (record,) = (one for one in planned.repairs if one.name == "qat")
    assert record.after_db > record.before_db + 1.0 and record.changed
    said = planned.plan.predicted
    assert said["picture_psnr_db"] > said["picture_psnr_db_untrained"]
    expected = f"qat: {record.where}, {record.before_db:.2f} -> {record.after_db:.2f} dB"
    assert planned.plan.repairs == (expected,)
    assert any(one.name == "repairs" and "no trajectory" in one.reason for one in planned.repairs)
    assert "quantization-aware training" in lines.stages and any("GB of memory" in note for note in lines.notes)
    path = tmp_path / "net.plan.toml"
    write_planned(path, planned)
    assert read_plan(path, student, load_target("iphone17")) == planned.plan


def test_killed_and_gone_on(exported, single, tmp_path, monkeypatch):
    """kill -9 while it trains: what was learned is not learned again, and the plan is that of an undisturbed run."""
    arguments = f"plan {exported} --target iphone17 --backend coreml --precision-set w4 --max-size 20% --qat {STEPS}"
    process = subprocess.Popen(
        [sys.executable, "-c", CLI, *arguments.split(), "-o", str(tmp_path / "never.toml")],
        env={**os.environ, "EDGEGEN_CACHE_DIR": str(tmp_path)},
        stderr=subprocess.PIPE,
    )
    try:
        end = time.monotonic() + 240
        while not list(tmp_path.glob("*/unfinished/*/state.safetensors")):
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.monotonic() < end, "no state was written"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "never.toml").exists()
    learned = []
    learn = Components.learn
    monkeypatch.setattr(Components, "learn", lambda self, i, changes: learned.append(i) or learn(self, i, changes))
    _, planned, _ = plan_of(exported, tmp_path, qat=STEPS)
    assert planned.plan == single[1].plan
    assert all(torch.equal(one, planned.tensors[name]) for name, one in single[1].tensors.items())
    assert learned and learned[0] >= qat.JUDGED_EVERY and len(learned) < STEPS
    assert not list(tmp_path.glob("*/unfinished/*")), "the state goes when the entry is there"


def test_what_was_trained_is_not_trained_again(exported, single, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(Components, "learn", lambda *given: pytest.fail("it was learned before"))
    roots = [path for path in tmp_path_factory.getbasetemp().glob("cache*") if list(path.glob("*/entries/plan-qat-*"))]
    assert any(plan_of(exported, root, qat=STEPS)[1].plan == single[1].plan for root in roots)


def test_training_that_does_not_help_leaves_the_plan_alone(exported, single, tmp_path, monkeypatch):
    monkeypatch.setattr(qat, "RATE", 3.0)
    _, planned, _ = plan_of(exported, tmp_path, qat=10)
    _, untrained, _ = plan_of(exported, tmp_path)
    assert planned.plan == untrained.plan and not planned.tensors
    assert planned.repairs[-1].name == "qat" and "held-back prompts" in planned.repairs[-1].reason
    assert single[1].plan != untrained.plan


def test_nothing_is_compressed(exported, tmp_path):
    from edgegen.students.load import load

    options = PlanOptions(precisions=(), min_psnr=20.0, qat=5)
    planned = make_plan(load(exported), load_target("iphone17"), ("coreml",), options, Cache(tmp_path), Lines())
    assert planned.repairs[-1].reason == "no weight is compressed"


def test_too_few_prompts(tiny, networks):
    from edgegen.precision.budget import Budget
    from edgegen.precision.plan import ComponentPlan

    trainer = trained.Trainer(tiny, networks, ("one", "two"), Cache(None), Lines(), lambda made: None, Budget())
    op = OpPlan(op="conv", precision="w8")
    reason = trainer._refusal({"decoder": ComponentPlan(float_precision="fp32", ops={"conv": op})})
    assert reason == "2 calibration prompts judge nothing else, and training takes at least 4"


def test_memory_is_asked_for_before_anything_else(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "available_memory", lambda: 100_000)
    lines = Lines()
    from edgegen.students.load import load

    options = PlanOptions(precisions=("w4",), qat=5)
    with pytest.raises(EdgegenError, match=r"takes about 0\.0 GB of memory, and 0\.0 GB are free") as caught:
        make_plan(load(exported), load_target("iphone17"), ("coreml",), options, Cache(tmp_path), lines)
    assert "without `--qat`" in caught.value.hint and "calibrate" not in lines.stages


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_steps_that_are_none(exported, steps, capsys):
    from edgegen.cli.main import main

    assert main(["plan", str(exported), "--target", "iphone17", "--qat", steps]) == 2
    assert "--qat" in capsys.readouterr().err
    if steps != "many":
        with pytest.raises(ValidationError):
            PlanOptions(qat=int(steps))


def test_the_unfinished_goes_with_the_cache(tmp_path):
    cache = Cache(tmp_path)
    key = cache.key("plan-qat", of="nothing")
    with pytest.raises(RuntimeError, match="cut off"):

        def build(folder):
            (cache.unfinished(key) / "state.safetensors").write_bytes(b"1234")
            raise RuntimeError("cut off")

        cache.directory(key, build)
    assert (cache.unfinished(key) / "state.safetensors").read_bytes() == b"1234" and cache.size().bytes == 4
    with pytest.raises(ValueError, match="is not a key"):
        cache.unfinished("../elsewhere")
    cache.clean()
    assert cache.size().bytes == 0
    cache.directory(key, lambda folder: (cache.unfinished(key) / "state").write_bytes(b"1") and None)
    assert not list(tmp_path.glob("*/unfinished/*"))
