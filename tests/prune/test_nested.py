"""`edgegen prune --levels`: each size is cut out of the one before, what is asked wrongly is refused, a kill costs
nothing."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from edgegen.cli.main import main
from edgegen.cli.prune import command
from edgegen.errors import UsageError
from edgegen.graph.capture import capture
from edgegen.graph.count import count
from edgegen.prune.apply import pruned
from edgegen.prune.elastic import at_level, check_nested, with_levels, without_levels
from edgegen.prune.nested import Asked, falling
from edgegen.students.checkpoint import save_pt
from edgegen.students.load import load
from edgegen.students.pruning import Pruning
from edgegen.students.sample import draw
from tests.prune.test_elastic import LEVELS, decoder_cut

FEW = ("--target", "linux-x86", "--samples", "2", "--steps", "1", "--json", "-q")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A cache of its own, and the tiny student in a file."""
    path = tmp_path_factory.mktemp("nested")
    save_pt(tiny, path / "model.pt")
    patch = pytest.MonkeyPatch()
    patch.setenv("EDGEGEN_CACHE_DIR", str(path / "cache"))
    yield path
    patch.undo()


def said(capsys, *args):
    capsys.readouterr()
    code = main(["prune", *map(str, args)])
    return code, capsys.readouterr()


@pytest.fixture(scope="module")
def made(folder):
    """What the command says, and what it wrote."""
    path = folder / "unhealed.pt"
    call = [str(folder / "model.pt"), *FEW, "--levels", "75%,denoiser=60%:decoder=40%", "-o", str(path)]
    done = CliRunner().invoke(command, call)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), load(path)


@pytest.fixture(scope="module")
def unhealed(made):
    return made[1]


def test_each_level_keeps_to_its_macs_and_is_cut_out_of_the_one_before(made):
    data, student = made
    assert data["sha256"] == student.fingerprint
    wanted = {"75": {"denoiser": 0.75, "decoder": 0.75}, "denoiser60-decoder40": {"denoiser": 0.6, "decoder": 0.4}}
    assert list(data["levels"]) == list(student.config.levels) == list(wanted)
    for name, shares in wanted.items():
        for component, share in shares.items():
            whole, left = data["levels"][name]["components"][component]["macs"]
            assert 0.5 * share < left / whole <= share * (1 + 1e-6)
            assert count(capture(at_level(student, name).components[component])).macs == left
    large, small = data["levels"].values()
    assert small["parameters"] < large["parameters"]
    assert small["latency_ms_estimated"]["onnx"] < data["latency_ms_estimated"]["onnx"]
    assert small["after"] is None and data["healed_steps"] is None
    check_nested(student.config.levels)


def test_what_is_stored_is_the_largest_level_and_no_more(tiny, unhealed):
    assert unhealed.config.levels["75"] == {}
    large = at_level(unhealed, "75")
    assert large.fingerprint == without_levels(unhealed).fingerprint
    for name in ("denoiser", "decoder"):
        whole = tiny.components[name].module.state_dict()
        left = large.components[name].module.state_dict()
        assert sum(map(torch.numel, left.values())) < sum(map(torch.numel, whole.values()))


def test_a_level_draws_what_the_same_cut_of_the_whole_draws(tiny):
    shifted = {"large": {"decoder": decoder_cut([0, 1, 4, 5, 7])}, "small": LEVELS["small"]}
    stored = with_levels(tiny, shifted)
    assert stored.config.levels["small"]["decoder"].positions("layers.2.conv.0.weight", 0) == (1, 2, 3)
    for name, cuts in shifted.items():
        one, other = (draw(each, ["a red circle"], [3], 2) for each in (at_level(stored, name), pruned(tiny, cuts)))
        assert torch.equal(one, other)
        assert at_level(stored, name).config.components["decoder"].pruning == cuts["decoder"]


def test_a_block_that_goes_takes_what_was_gone_within_it():
    outer = Pruning.of({"x.b.weight": {0: [0, 1]}}, {"x.a": "zero"})
    assert outer.then(Pruning(removed={"x": "identity"})) == Pruning(removed={"x": "identity"})


def test_healing_trains_all_levels_and_says_what_it_made(folder, unhealed, capsys):
    path = folder / "healed.pt"
    levels = ("--levels", "75%,denoiser=60%:decoder=40%", "--level-names", "large,small", "--heal", "3")
    levels += ("--heal-batch", "2")
    code, out = said(capsys, folder / "model.pt", *FEW, *levels, "-o", path)
    assert code == 0, out.err
    data = json.loads(out.out)
    assert data["healed_steps"] == 3
    assert all(one["after"]["psnr_db"] != one["before"]["psnr_db"] for one in data["levels"].values())
    healed = load(path)
    assert list(healed.config.levels) == ["large", "small"]
    assert list(healed.config.levels.values()) == list(unhealed.config.levels.values())
    assert healed.components["denoiser"].fingerprint != unhealed.components["denoiser"].fingerprint
    assert healed.components["text_encoder"].fingerprint == unhealed.components["text_encoder"].fingerprint


def test_levels_of_separable_convolutions_learn_from_the_dense_student(folder, tiny, capsys):
    path = folder / "separable.pt"
    levels = ("--levels", "70%,50%", "--separable", "denoiser=90%,decoder=80%", "--heal", "3", "--heal-batch", "2")
    code, out = said(capsys, folder / "model.pt", *FEW, *levels, "-o", path)
    assert code == 0, out.err
    made, data = load(path), json.loads(out.out)["levels"]
    small = at_level(made, "50")
    for name in ("denoiser", "decoder"):
        assert small.config.components[name].pruning.separated
        whole, left = data["50"]["components"][name]["macs"]
        assert whole == count(capture(tiny.components[name])).macs, "shares are of the dense student"
        assert left == count(capture(small.components[name])).macs <= 0.5 * whole
    assert data["50"]["after"]["psnr_db"] != data["50"]["before"]["psnr_db"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--levels", "50%,75%"), 2, "levels do not fall: `75` has as many MACs as `50`"),
        (("--levels", "75%,75%", "--level-names", "a,b"), 2, "levels do not fall: `b`"),
        (("--levels", "75%,75%"), 2, "two levels are named `75`"),
        (("--levels", "75%,50%", "--level-names", "a"), 2, "has 1 names and `--levels` 2 levels"),
        (("--levels", "75%", "--level-names", "Large!"), 2, "is no name of a level"),
        (("--level-names", "a", "--ratio", "0.4"), 2, "there are none"),
        (("--levels", "0%"), 2, "is not a share"),
        (("--levels", "fast"), 2, "is not a share"),
        (("--levels", "nothing=50%"), 2, "has no component `nothing`"),
        (("--levels", "text_encoder=50%"), 2, "which is not pruned"),
        (("--levels", "75%,1%"), 3, "level `1`: no legal network keeps to this budget"),
        (("--levels", "75%", "--ratio", "0.4"), 2, "and so do"),
        (("--levels", "75%", "--max-macs", "60%"), 2, "and so do"),
        (("--levels", "75%", "--recipe", "x.json"), 2, "so does another option"),
        (("--levels", "75%", "--max-latency", "0.6x"), 2, "and so do"),
        (("--levels", "75%", "--heal", "3", "--min-psnr", "20"), 2, "end the healing of one size"),
    ],
)
def test_what_cannot_be_asked_is_refused(folder, unhealed, capsys, args, code, message):
    found, out = said(capsys, folder / "model.pt", *FEW, "-o", folder / "x.pt", *args)
    assert found == code, out.err
    assert message in out.err
    assert out.out == "" and not (folder / "x.pt").exists()


def test_what_has_levels_is_not_pruned_again(folder, unhealed, capsys):
    for args in (("--levels", "75%"), ("--ratio", "0.4")):
        code, out = said(capsys, folder / "unhealed.pt", *FEW, *args, "-o", folder / "x.pt")
        assert code == 2
        assert "holds several sizes (`75`, `denoiser60-decoder40`)" in out.err
        assert "`edgegen student level MODEL 75 -o one.pt`" in out.err


def test_a_level_is_evaluated_and_inspected_by_its_name(folder, unhealed, capsys):
    path = str(folder / "unhealed.pt")
    assert main(["student", "eval", path, "--limit", "2"]) == 2
    assert "several sizes, and nothing says which" in capsys.readouterr().err
    assert main(["student", "eval", path, "--limit", "2", "--level", "75", "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 2
    assert main(["inspect", path]) == 0
    assert "holds 2 sizes: 75, denoiser60-decoder40; this is `75`" in capsys.readouterr().out


def test_a_finished_graph_has_no_levels(tmp_path, capsys):
    class Small(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x)

    torch.export.save(torch.export.export(Small(), (torch.randn(1, 4),)), tmp_path / "model.pt2")
    code, out = said(capsys, tmp_path / "model.pt2", *FEW, "--levels", "75%")
    assert code == 2 and "no modules to prune" in out.err


def test_a_level_that_names_some_components_leaves_the_others_as_they_were():
    asked = [Asked("a", {"denoiser": 0.5}), Asked("b", {"decoder": 0.4}), Asked("c", {"": 0.3, "decoder": 0.2})]
    found = [one.shares for one in falling(asked, ("denoiser", "decoder"))]
    assert found == [
        {"denoiser": 0.5, "decoder": 1.0},
        {"denoiser": 0.5, "decoder": 0.4},
        {"denoiser": 0.3, "decoder": 0.2},
    ]
    with pytest.raises(UsageError, match="do not fall"):
        falling([Asked("a", {"": 0.5}), Asked("b", {"decoder": 0.6})], ("denoiser", "decoder"))


SCRIPT = """
import sys, torch
from pathlib import Path
from edgegen.cache import Cache
from edgegen.prune.elastic import heal_levels, with_levels
from edgegen.prune.heal import HealOptions
from edgegen.students.load import load
from tests.prune.test_elastic import LEVELS
torch.set_num_threads(1)
class Shown:
    def stage(self, name, total): print(name, flush=True)
    def advance(self): print("step", flush=True)
    def note(self, text): pass
    def status(self, text): pass
options = HealOptions(steps=30, batch=4, judge_every=5)
teacher = load(Path(sys.argv[1]))
made = heal_levels(teacher, with_levels(teacher, LEVELS), options, Cache(Path(sys.argv[2])), Shown())
print("made", made.fingerprint, flush=True)
"""


@pytest.mark.slow
def test_killed_and_gone_on(folder, tmp_path):
    """kill -9 amid the sandwich, then the same call: fewer steps are left, and the bits are those of a whole run."""
    call = [sys.executable, "-c", SCRIPT, str(folder / "model.pt")]
    whole = subprocess.run([*call, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True, check=True).stdout
    with subprocess.Popen([*call, str(tmp_path / "b")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        steps = 0
        for line in process.stdout:
            steps += line == "step\n"
            if steps == 17:
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    again = subprocess.run([*call, str(tmp_path / "b")], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert whole.splitlines()[-1].startswith("made ")
    assert again.splitlines()[-1] == whole.splitlines()[-1]
