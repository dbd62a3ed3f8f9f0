"""Several sizes in one checkpoint: slices, nesting, training, taking one out."""

import copy
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edgegen.cache import Cache
from edgegen.cli.student import level_command
from edgegen.errors import EdgegenError, UsageError
from edgegen.prune.apply import pruned
from edgegen.prune.elastic import Slice, at_level, check_nested, heal_levels, nested, with_levels
from edgegen.prune.heal import HealOptions
from edgegen.students.checkpoint import save_pt
from edgegen.students.load import load
from edgegen.students.pruning import Pruning
from edgegen.students.sample import draw
from tests.silent import Silent


def decoder_cut(kept):
    cuts = {"layers.2.conv.0.weight": {0: kept}, "layers.2.conv.0.bias": {0: kept}}
    cuts["layers.2.conv.2.weight"] = {1: kept}
    return Pruning.of(cuts)


LEVELS = {
    "large": {},
    "medium": {"decoder": decoder_cut([0, 1, 2, 3, 4, 5])},
    "small": {"decoder": decoder_cut([1, 4, 5])},
}


def test_a_slice_is_the_pruned_network_and_its_gradients_reach_the_whole(tiny):
    part = tiny.components["decoder"]
    whole = copy.deepcopy(part.module).requires_grad_(True)
    cut = LEVELS["small"]["decoder"]
    piece = Slice(whole, cut)
    assert not list(piece.parameters()), "nothing is trained twice"
    (latent,) = part.example_inputs()
    made = piece(latent)
    wanted = pruned(tiny, {"decoder": cut}).components["decoder"].module(latent)
    assert torch.equal(made, wanted)
    made.square().mean().backward()
    gradient = whole.layers[2].conv[0].weight.grad
    assert gradient[[1, 4, 5]].abs().sum() > 0 and gradient[[0, 2, 3, 6, 7]].abs().sum() == 0
    with torch.no_grad():
        whole.layers[2].conv[0].weight.mul_(2)
    assert not torch.equal(piece(latent), wanted), "it follows the whole"


def test_nesting():
    large, small = LEVELS["medium"]["decoder"], LEVELS["small"]["decoder"]
    assert nested(Pruning(), small) and nested(large, small) and not nested(small, large)
    assert not nested(large, decoder_cut([1, 7]))
    assert not nested(Pruning(removed={"x": "identity"}), Pruning())
    assert nested(large, Pruning(removed={"layers.2": "identity"})), "a cut within what is gone asks nothing"
    check_nested(LEVELS)
    with pytest.raises(EdgegenError, match="level `medium` is not cut out of `small`"):
        check_nested(dict(reversed(LEVELS.items())))


def test_levels_are_trained_saved_and_taken_out(tiny, tmp_path):
    options = HealOptions(steps=100, batch=8, rate=1e-2)
    made = heal_levels(tiny, with_levels(tiny, LEVELS), options, Cache(tmp_path / "cache"), Silent())
    path = Path(tmp_path / "elastic.pt")
    save_pt(made, path)
    read = load(path)
    assert list(read.config.levels) == ["large", "medium", "small"]
    prompts, seeds = ["a small red circle", "a large blue square"] * 4, list(range(8))
    truth = draw(tiny, prompts, seeds, 2)

    def error(student):
        return float((draw(student, prompts, seeds, 2) - truth).square().mean())

    small = at_level(read, "small")
    assert not small.config.levels
    assert small.config.components["decoder"].pruning == LEVELS["small"]["decoder"]
    assert error(small) < 0.8 * error(pruned(tiny, LEVELS["small"]))
    assert error(at_level(read, "medium")) < error(pruned(tiny, LEVELS["medium"]))
    done = CliRunner().invoke(level_command, [str(path), "--json"])
    assert list(json.loads(done.stdout)["levels"]) == ["large", "medium", "small"]
    done = CliRunner().invoke(level_command, [str(path), "small", "-o", str(tmp_path / "small.pt")])
    assert done.exit_code == 0, done.output
    assert load(tmp_path / "small.pt").fingerprint == small.fingerprint


def test_levels_that_are_not_there(tiny):
    with pytest.raises(UsageError, match="has one size"):
        at_level(tiny, "small")
    config = tiny.config.model_copy(update={"levels": LEVELS})
    with pytest.raises(UsageError, match="no level `tiny`") as refused:
        at_level(type(tiny)(config, tiny.components, tiny.tokenizer_json), "tiny")
    assert "--level medium" in (refused.value.hint or "")


def test_a_config_without_levels_is_written_as_before(tiny):
    assert "levels" not in tiny.config.model_dump() and "levels" not in tiny.config.model_dump_json()
    with pytest.raises(ValueError, match="not there"):
        type(tiny.config).model_validate(tiny.config.model_dump() | {"levels": {"small": {"nose": Pruning()}}})
