"""`edgegen prune` makes what it says, and says why it does not."""

import json

import pytest
import torch

from edgegen.cache import Cache
from edgegen.cli.console import progress
from edgegen.cli.main import main
from edgegen.errors import UsageError
from edgegen.graph.capture import capture
from edgegen.graph.count import count
from edgegen.prune.apply import pruned
from edgegen.prune.command import prune
from edgegen.prune.find import spaces
from edgegen.prune.importance import Probe, confirmed, importance, magnitude, zeroed
from edgegen.prune.options import PruneOptions
from edgegen.prune.ratio import by_ratio
from edgegen.prune.space import to_pruning
from edgegen.students.checkpoint import save_pt
from edgegen.students.load import load
from edgegen.targets import load_target


@pytest.fixture(scope="module")
def checkpoint(shapes, tmp_path_factory):
    path = tmp_path_factory.mktemp("prune") / "model.pt"
    save_pt(shapes, path)
    return path


@pytest.fixture(scope="module")
def decoder(shapes):
    return spaces(capture(shapes.components["decoder"]))


def said(capsys, *args):
    code = main(["prune", *map(str, args), "--target", "linux-x86"])
    return code, capsys.readouterr()


def test_a_ratio_writes_a_student_that_loads_and_draws_like_any_other(checkpoint, tmp_path, capsys):
    made = tmp_path / "small.pt"
    options = (
        "--component",
        "decoder",
        "--ratio",
        "0.25",
        "--samples",
        "2",
        "--steps",
        "1",
        "-o",
        made,
        "--json",
        "-q",
    )
    code, out = said(capsys, checkpoint, *options)
    assert code == 0, out.err
    data = json.loads(out.out)
    before, after = data["components"]["decoder"]["macs"]
    student = load(made)
    assert after < 0.7 * before
    assert count(capture(student.components["decoder"])).macs == after
    assert student.fingerprint == data["sha256"]
    assert 10 < data["picture_psnr_db"] < 60
    assert data["rank_correlation"] > 0.9
    assert "output of the component" in " ".join(data["frozen"]["decoder"])
    assert student.components["text_encoder"].fingerprint == load(checkpoint).components["text_encoder"].fingerprint


def test_one_ratio_for_a_budget_of_macs_comes_near_it_from_below(shapes):
    options = PruneOptions(("decoder",), max_macs={"": 0.5}, uniform=True, samples=2, steps=1)
    with progress(quiet=True) as shown:
        made = prune(shapes, load_target("linux-x86"), ("onnx",), options, Cache(None), shown)
    (part,) = made.parts
    assert 0.35 < part.after.macs / part.before.macs <= 0.5
    assert part.units[1] < part.units[0]
    assert made.correlation is None


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "nothing says how small"),
        (("--ratio", "0.999"), 2, "leaves nothing of"),
        (("--ratio", "1"), 2, "not in the range"),
        (("--ratio", "0.5", "--max-macs", "50%"), 2, "so does a budget"),
        (("--max-macs", "fast"), 2, "is not a share"),
        (("--max-macs", "150%"), 2, "is not a share"),
        (("--max-macs", "nothing=50%"), 2, "has no component `nothing`"),
        (("--max-macs", "denoiser=50%"), 2, "which is not pruned"),
        (("--max-macs", "0.1%", "--uniform"), 3, "at the highest it still has"),
        (("--max-latency", "5ms", "--uniform"), 2, "not latency"),
        (("--max-latency", "5"), 2, "is not milliseconds"),
    ],
)
def test_what_cannot_be_asked_is_refused(checkpoint, tmp_path, capsys, args, code, message):
    found, out = said(capsys, checkpoint, "--component", "decoder", "--samples", "2", "-o", tmp_path / "x.pt", *args)
    assert found == code
    assert message in out.err
    assert out.out == ""
    assert not (tmp_path / "x.pt").exists()


def test_a_finished_graph_is_refused_with_what_to_pass_instead(tmp_path, capsys):
    class Small(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x)

    torch.export.save(torch.export.export(Small(), (torch.randn(1, 4),)), tmp_path / "model.pt2")
    code, out = said(capsys, tmp_path / "model.pt2", "--ratio", "0.5")
    assert code == 2
    assert "no modules to prune" in out.err
    assert "that the `.pt2` was exported from" in out.err


def test_importance_is_what_zeroing_does_to_first_order(shapes, decoder):
    """Not the effect itself, but its order over units."""
    probe = Probe.of(shapes, samples=2, steps=1, vectors=8)
    scores = importance(probe, {"decoder": decoder})
    correlation, measured = confirmed(probe, {"decoder": decoder}, scores, units=10)
    assert measured == 10
    assert correlation > 0.9


def test_a_unit_that_nothing_reads_is_worth_nothing(shapes, decoder):
    space = decoder["layers.2.conv.0"]
    before = importance(Probe.of(shapes, samples=2, steps=1), {"decoder": decoder})["decoder"].units[space.name]
    gone = before.argsort()[-2:].tolist()
    deaf = zeroed(shapes, "decoder", space, gone)
    after = importance(Probe.of(deaf, samples=2, steps=1), {"decoder": decoder})["decoder"].units[space.name]
    assert (before[gone] > 0).all()
    assert (after[gone] == 0).all()


def test_a_zeroed_unit_and_a_removed_one_give_the_same_picture(shapes, decoder):
    """The decoder has no norms, so nothing else changes."""
    space = decoder["layers.5"]
    gone = [1, 4, 30]
    kept = [unit for unit in range(space.count) if unit not in gone]
    small = pruned(shapes, {"decoder": to_pruning(decoder, {space.name: kept})})
    masked = zeroed(shapes, "decoder", space, gone)
    inputs = shapes.components["decoder"].example_inputs()
    expected, made = (one.components["decoder"].module(*inputs) for one in (masked, small))
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)


def test_magnitude_is_the_norm_of_what_writes_a_unit(shapes, decoder):
    found = magnitude(shapes.components["decoder"], decoder)["layers.2.conv.0"]
    conv = shapes.components["decoder"].module.get_submodule("layers.2.conv.0")
    expected = (conv.weight.square().sum((1, 2, 3)) + conv.bias.square()).sqrt()
    assert found == pytest.approx(expected.numpy(), rel=1e-5)


def test_a_selection_that_a_space_cannot_have_is_refused(shapes, decoder):
    with pytest.raises(UsageError, match="nothing would be left"):
        to_pruning(decoder, {"layers.5": []})
    with pytest.raises(UsageError, match="cannot be cut"):
        to_pruning(decoder, {"layers.11": [0, 1]})
    denoiser = spaces(capture(shapes.components["denoiser"]))
    with pytest.raises(UsageError, match="different sizes"):
        to_pruning(denoiser, {"conv_in": list(range(61))})
    with pytest.raises(UsageError, match="between 0 and 1"):
        by_ratio(decoder, {}, 0.0)
