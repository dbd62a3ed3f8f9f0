"""Healing of small students with random weights: what is learned, what is refused, and what a kill leaves."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from edgegen.cache import Cache
from edgegen.errors import EdgegenError
from edgegen.prune.apply import pruned
from edgegen.prune.features import Watch, difference, taps
from edgegen.prune.heal import HealOptions, between, heal
from edgegen.prune.judging import Judge, prompts_to_heal
from edgegen.prune.lessons import Pair, Walks, fastest, takes_batches
from edgegen.prune.training import Judged
from edgegen.students.pruning import Pruning
from edgegen.students.shapes.grammar import held_back
from tests.silent import Silent


def inner(student):
    """Half of what is between the two convolutions of each block, and of the decoder's blocks."""
    denoiser, decoder = {}, {}
    for path, module in student.components["denoiser"].module.named_modules():
        if hasattr(module, "time_emb_proj"):
            channels = module.conv1.out_channels
            each = channels // module.norm2.num_groups
            kept = [i for i in range(channels) if i % each < each // 2]
            outward = ("conv1.weight", "conv1.bias", "time_emb_proj.weight", "time_emb_proj.bias")
            for name in (*outward, "norm2.weight", "norm2.bias"):
                denoiser[f"{path}.{name}"] = {0: kept}
            denoiser[f"{path}.conv2.weight"] = {1: kept}
    for path, module in student.components["decoder"].module.named_modules():
        if isinstance(getattr(module, "conv", None), nn.Sequential):
            kept = list(range(0, module.conv[0].out_channels, 2))
            decoder |= {f"{path}.conv.0.weight": {0: kept}, f"{path}.conv.0.bias": {0: kept}}
            decoder |= {f"{path}.conv.2.weight": {0: kept, 1: kept}, f"{path}.conv.2.bias": {0: kept}}
            decoder[f"{path}.conv.4.weight"] = {1: kept}
    return {"denoiser": Pruning.of(denoiser), "decoder": Pruning.of(decoder)}


@pytest.fixture(scope="module")
def cut(tiny):
    return pruned(tiny, inner(tiny))


def test_both_networks_come_nearer(tiny, cut, tmp_path):
    shown = Silent()
    options = HealOptions(steps=60, batch=8, rate=5e-3, judge_every=60)
    made = heal(tiny, cut, options, Cache(tmp_path), shown)
    assert [(one.component, one.phase) for one in made.lessons] == [
        ("denoiser", "width"),
        ("decoder", "width"),
        ("both", "together"),
    ]
    assert made.after.psnr_db > made.before.psnr_db + 1
    assert made.student.config == cut.config
    text = "text_encoder"
    assert made.student.components[text].fingerprint == tiny.components[text].fingerprint
    again = heal(tiny, cut, options, Cache(tmp_path), Silent())
    assert again.student.fingerprint == made.student.fingerprint, "kept in the cache"


def test_another_seed_learns_otherwise_and_as_well(tiny, cut, tmp_path):
    options = [HealOptions(steps=20, batch=4, judge_every=20, seed=seed) for seed in (0, 1)]
    made = [heal(tiny, cut, one, Cache(tmp_path), Silent()) for one in options]
    assert made[0].student.fingerprint != made[1].student.fingerprint
    assert min(one.after.psnr_db for one in made) > made[0].before.psnr_db


def test_depth_comes_before_width(tiny, tmp_path):
    cuts = inner(tiny)["denoiser"]
    path = "down_blocks.1.attentions.0"
    both = Pruning(kept=cuts.kept, cuts=cuts.cuts, removed={path: "identity"})
    made = heal(tiny, pruned(tiny, {"denoiser": both}), HealOptions(steps=20, batch=2), Cache(tmp_path), Silent())
    depth, width = made.lessons
    assert (depth.phase, width.phase) == ("depth", "width") and depth.course.step + width.course.step == 20
    assert 1 <= depth.course.step < 6, "0.3 of the work, and these steps cost more"
    assert made.student.config.components["denoiser"].pruning == both


def test_nothing_cut_and_nothing_drawn_are_refused(tiny, cut, tmp_path):
    with pytest.raises(EdgegenError, match="nothing was cut"):
        heal(tiny, tiny, HealOptions(steps=1), Cache(tmp_path), Silent())
    config = tiny.config.model_copy(update={"sampler": None})
    with pytest.raises(EdgegenError, match="draws no pictures"):
        heal(replace(tiny, config=config), cut, HealOptions(steps=1), Cache(tmp_path), Silent())


def test_what_is_enough():
    none, drop, decibels = HealOptions(1), HealOptions(1, max_drop=0.01), HealOptions(1, min_psnr=25.0)
    found = Judged(psnr_db=24.0, alignment=0.985)
    assert not none.enough(found, 0.99)
    assert drop.enough(found, 0.99) and not drop.enough(found, 1.0)
    assert not decibels.enough(found, 0.99) and decibels.enough(found.model_copy(update={"psnr_db": 25.5}), 0.99)


def test_prompts_of_shapes_leave_out_those_that_are_evaluated(shapes):
    found = prompts_to_heal(shapes)
    asked = {scene.prompt() for scene in held_back()}
    assert not asked & {*found.learning, *found.judging}
    assert not set(found.judging) & set(found.learning)
    assert len(found.judging) == len(found.scenes) and len(set(found.learning)) > 2000
    assert Judge(shapes, replace(found, judging=found.judging[::12], scenes=found.scenes[::12])).of_teacher == 1.0


def pair_of(tiny, cut, name="denoiser"):
    part, module = tiny.components[name], cut.components[name].module
    cuts = cut.config.components[name].pruning
    return Pair(part, module, taps(module, part.module, cuts), fastest(), takes_batches(part))


def test_features_are_compared_on_the_channels_that_are_left(tiny, cut):
    """A network whose dropped channels were zero on their way out says the same inside and outside as the cut one."""
    import copy

    cuts = inner(tiny)["denoiser"]
    module = copy.deepcopy(tiny.components["denoiser"].module)
    with torch.no_grad():
        for path, one in module.named_modules():
            if hasattr(one, "time_emb_proj"):
                kept = torch.tensor(cuts.positions(f"{path}.conv2.weight", 1))
                gone = torch.ones(one.conv1.out_channels, dtype=torch.bool)
                gone[kept] = False
                for value in (one.conv1.weight, one.conv1.bias, one.time_emb_proj.weight, one.time_emb_proj.bias):
                    value[gone] = 0
    small = cut.components["denoiser"].module
    found = taps(small, module, cuts)
    assert {tap.path for tap in found} >= {"conv_norm_out", "down_blocks.0.resnets.0.norm2"}
    inputs = tiny.components["denoiser"].example_inputs()
    with torch.no_grad(), Watch(module, found) as theirs, Watch(small, found) as mine:
        module(*inputs), small(*inputs)
        first = [tap for tap in found if tap.path.startswith("down_blocks.0.resnets.0")]
        assert len(first) == 2 and mine.seen[first[1].path].shape[1] * 2 == theirs.seen[first[1].path].shape[1]
        assert float(difference(tuple(first), mine.seen, theirs.seen)) < 1e-10
        assert float(difference(found, mine.seen, theirs.seen)) > 1e-4, "norms see half of a group further on"
    assert not mine.seen


def test_walks_go_on_where_their_state_says(tiny, cut):
    def walks():
        return Walks(tiny, pair_of(tiny, cut), ("a small red circle", "a large blue square"), 6, 7, 0.3)

    one, other = walks(), walks()
    first = [float(one.learn(i).detach()) for i in range(4)]
    other.restore(one.state())
    assert float(one.learn(4).detach()) == float(other.learn(4).detach())
    assert [float(value) for value in first] != [first[0]] * 4
    assert set(one.state()["count"].tolist()) == {0, 1}, "both step counts are walked"


def test_batches_are_taken_where_rows_do_not_mix(tiny):
    assert takes_batches(tiny.components["denoiser"])

    class Mixing(nn.Module):
        def forward(self, latent):
            return latent - latent.mean(0, keepdim=True)

    part = replace(tiny.components["decoder"], module=Mixing())
    assert not takes_batches(part)


def test_between():
    before = Pruning.of({"a.weight": {0: [0, 2, 4, 6]}, "b": {0: [1]}}, {"x": "identity"})
    after = Pruning.of({"a.weight": {0: [2, 6], 1: [0, 1]}}, {"x": "identity", "y": "zero"})
    found = between(before, after)
    assert found.positions("a.weight", 0) == (1, 3) and found.positions("a.weight", 1) == (0, 1)
    assert found.removed == {"y": "zero"}
    with pytest.raises(EdgegenError, match="does not have any more"):
        between(before, Pruning.of({"a.weight": {0: [1]}}))


SCRIPT = """
import sys, torch
from pathlib import Path
from edgegen.cache import Cache
from edgegen.prune.apply import pruned
from edgegen.prune.heal import HealOptions, heal
from edgegen.students.load import load
torch.set_num_threads(1)
class Shown:
    def stage(self, name, total): print(name, flush=True)
    def advance(self): print("step", flush=True)
    def note(self, text): pass
    def status(self, text): pass
teacher, cut = load(Path(sys.argv[1])), load(Path(sys.argv[2]))
made = heal(teacher, cut, HealOptions(steps=40, batch=4, judge_every=5), Cache(Path(sys.argv[3])), Shown())
print("made", made.student.fingerprint, flush=True)
"""


@pytest.mark.slow
def test_killed_and_gone_on(tiny, cut, tmp_path):
    """kill -9 in the middle of the second network, then the same call: what an undisturbed run makes."""
    from edgegen.students.checkpoint import save_pt

    save_pt(tiny, tmp_path / "teacher.pt")
    save_pt(cut, tmp_path / "cut.pt")
    call = [sys.executable, "-c", SCRIPT, str(tmp_path / "teacher.pt"), str(tmp_path / "cut.pt")]
    whole = subprocess.run([*call, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True, check=True).stdout
    with subprocess.Popen([*call, str(tmp_path / "b")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        decoding, steps = False, 0
        for line in process.stdout:
            decoding = decoding or "decoder" in line
            steps += decoding and line == "step\n"
            if steps == 12:
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    started = time.monotonic()
    again = subprocess.run([*call, str(tmp_path / "b")], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert time.monotonic() - started < 300
    assert whole.splitlines()[-1].startswith("made ")
    assert again.splitlines()[-1] == whole.splitlines()[-1]


def test_the_command_heals(tiny, tmp_path):
    import json

    from click.testing import CliRunner

    from edgegen.cli.prune import command
    from edgegen.students.checkpoint import save_pt
    from edgegen.students.load import load

    model, made = tmp_path / "model.pt", tmp_path / "made.pt"
    save_pt(tiny, model)
    call = [str(model), "--target", "linux-x86", "--ratio", "0.25", "--samples", "2", "-o", str(made), "--json"]
    env = {"EDGEGEN_CACHE_DIR": str(tmp_path / "cache")}
    done = CliRunner().invoke(command, [*call, "--heal", "3", "--heal-batch", "2"], env=env)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)["healing"]
    assert [(one["component"], one["steps"]) for one in said["courses"]] == [
        ("denoiser", 3),
        ("decoder", 3),
        ("both", 1),
    ]
    assert said["after"]["psnr_db"] != said["before"]["psnr_db"]
    assert load(made).config.components["decoder"].pruning is not None
    refused = CliRunner().invoke(command, [*call, "--max-drop", "0.01"], env=env)
    assert "--heal" in getattr(refused.exception, "hint", "")
