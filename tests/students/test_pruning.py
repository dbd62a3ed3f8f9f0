"""A pruned student is plain data: it comes back as it was, and a record that does not fit its network is refused."""

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.prune.apply import pruned
from edgegen.students.checkpoint import save_pt
from edgegen.students.load import load
from edgegen.students.pruning import Pruning
from edgegen.students.reduce import Passed, norm_groups, reduce

FF = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net"
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
INNER = 384


def halved(count=INNER):
    """A feed-forward of `shapes` with every other inner unit, and an attention passed by."""
    kept = list(range(0, count, 2))
    both = kept + [count + one for one in kept]
    cuts = {f"{FF}.0.proj.weight": {0: both}, f"{FF}.0.proj.bias": {0: both}, f"{FF}.2.weight": {1: kept}}
    return Pruning.of(cuts, {ATTENTION: "zero"})


@pytest.fixture(scope="module")
def smaller(shapes):
    return pruned(shapes, {"denoiser": halved()})


def test_a_pruned_pt_comes_back_as_it_was(smaller, tmp_path):
    save_pt(smaller, tmp_path / "model.pt")
    found = load(tmp_path / "model.pt")
    assert found.fingerprint == smaller.fingerprint
    inputs = found.components["denoiser"].example_inputs()
    expected, made = (one.components["denoiser"].module(*inputs) for one in (smaller, found))
    assert torch.equal(expected, made)
    kept = found.components["denoiser"].module.get_submodule(f"{FF}.2")
    assert (kept.in_features, kept.weight.shape[1]) == (INNER // 2, INNER // 2)


def test_pruned_safetensors_come_back(smaller, tmp_path):
    tensors = {
        f"{name}.{key}": value.contiguous()
        for name, part in smaller.components.items()
        for key, value in part.module.state_dict().items()
    }
    save_file(tensors, tmp_path / "small.safetensors")
    (tmp_path / "small.json").write_text(smaller.config.model_dump_json())
    (tmp_path / "tokenizer.json").write_text(smaller.tokenizer_json)
    assert load(tmp_path / "small.safetensors").fingerprint == smaller.fingerprint


def test_the_config_of_an_unpruned_student_is_written_as_before(shapes):
    assert "pruning" not in shapes.config.model_dump_json()
    assert "pruning" not in shapes.config.model_dump()["components"]["denoiser"]


def test_pruning_twice_is_one_record_of_the_first_network(shapes, smaller):
    both = [0, 2, INNER // 2, INNER // 2 + 2]
    more = {f"{FF}.0.proj.weight": {0: both}, f"{FF}.0.proj.bias": {0: both}, f"{FF}.2.weight": {1: [0, 2]}}
    again = pruned(smaller, {"denoiser": Pruning.of(more)})
    record = again.config.components["denoiser"].pruning
    assert record.positions(f"{FF}.2.weight", 1) == (0, 4)
    assert record.removed == {ATTENTION: "zero"}
    whole = shapes.components["denoiser"].module.get_submodule(f"{FF}.2").weight
    assert torch.equal(again.components["denoiser"].module.get_submodule(f"{FF}.2").weight, whole[:, [0, 4]])


@pytest.mark.parametrize(
    ("kept", "cut", "reason"),
    [
        (["3-1"], {}, "ascending"),
        (["0-3,2"], {}, "ascending"),
        (["0,,3"], {}, "list of positions"),
        (["-1"], {}, "list of positions"),
        (["0-99999999999"], {}, "list of positions"),
        (["0"], {"conv_in.weight": {0: 1}}, "names list 1"),
        (["0"], {"conv_in.weight": {-1: 0}}, "dimension -1"),
    ],
)
def test_records_that_mean_nothing_are_refused(kept, cut, reason):
    with pytest.raises(ValidationError, match=reason):
        Pruning(kept=tuple(kept), cuts=cut)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"kept": ["0-999999999"], "cuts": {"conv_in.weight": {"0": 0}}}, "keeps position 999999999"),
        ({"kept": ["0"], "cuts": {"nothing.weight": {"0": 0}}}, "does not have"),
        ({"kept": ["0"], "cuts": {"conv_in.weight": {"7": 0}}}, "dimension 7"),
        ({"removed": {"nothing": "zero"}}, "does not have"),
        ({"removed": {"": "identity"}}, "does not have"),
        ({"removed": {"down_blocks.1": "identity", "down_blocks.1.resnets": "identity"}}, "within another"),
        ({"kept": ["0-3"], "cuts": {"conv_in.weight": {"0": 0}}}, "do not fit its config"),
        ({"removed": {"time_embedding": "identity"}}, "do not fit its config"),
    ],
)
def test_a_record_that_does_not_fit_the_network_is_refused(shapes, tmp_path, record, reason):
    save_pt(shapes, tmp_path / "model.pt")
    payload = torch.load(tmp_path / "model.pt", weights_only=True)
    payload["config"]["components"]["denoiser"]["pruning"] = json.loads(json.dumps(record))
    torch.save(payload, tmp_path / "model.pt")
    with pytest.raises(EdgegenError, match=reason) as caught:
        load(tmp_path / "model.pt")
    assert caught.value.hint


def test_a_module_that_cannot_be_passed_by_is_refused(shapes, tmp_path):
    """Its weights are left out as the record says, and then the shapes of what follows do not fit."""
    save_pt(shapes, tmp_path / "model.pt")
    payload = torch.load(tmp_path / "model.pt", weights_only=True)
    payload["config"]["components"]["denoiser"]["pruning"] = {"removed": {"conv_in": "identity"}}
    state = payload["state_dicts"]["denoiser"]
    payload["state_dicts"]["denoiser"] = {k: v for k, v in state.items() if not k.startswith("conv_in.")}
    torch.save(payload, tmp_path / "model.pt")
    with pytest.raises(EdgegenError, match="does not take its stated inputs"):
        load(tmp_path / "model.pt")


def test_a_group_of_a_convolution_goes_whole():
    module = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4))
    with pytest.raises(EdgegenError, match="in two"):
        reduce(module, Pruning.of({"0.weight": {0: [0, 1, 2]}}), weights=True)


def test_depthwise_and_transposed_convolutions_know_their_sizes():
    module = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2))
    kept = [1, 2, 5]
    record = Pruning.of({"0.weight": {0: kept}, "0.bias": {0: kept}, "1.weight": {0: kept}})
    expected = [module[0].weight[kept].clone(), module[1].weight[kept].clone()]
    reduce(module, record, weights=True)
    assert (module[0].groups, module[0].in_channels, module[0].out_channels) == (3, 3, 3)
    assert (module[1].in_channels, module[1].out_channels) == (3, 4)
    assert torch.equal(module[0].weight, expected[0])
    assert torch.equal(module[1].weight, expected[1])
    assert module(torch.randn(1, 3, 8, 8)).shape == (1, 4, 7, 7)


def test_tied_weights_are_cut_once_and_stay_tied():
    module = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6)})
    module["b"].weight = module["a"].weight
    reduce(module, Pruning.of({"a.weight": {0: [0, 1]}, "a.bias": {0: [0, 1]}, "b.bias": {0: [0, 1]}}), weights=False)
    assert module["b"].weight is module["a"].weight
    assert module["b"].out_features == 2


def test_tied_weights_that_are_cut_in_two_ways_are_refused():
    module = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6)})
    module["b"].weight = module["a"].weight
    record = Pruning.of({"a.weight": {0: [0, 1]}, "b.weight": {0: [0, 2]}})
    with pytest.raises(EdgegenError, match="tied"):
        reduce(module, record, weights=True)


def test_norms_without_weights_are_resized_by_their_own_name():
    module = nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.GroupNorm(3, 6, affine=False))
    reduce(module, Pruning.of({"0.normalized_shape": {0: [0, 1]}, "1.num_channels": {0: [0, 2, 4]}}), weights=True)
    assert module[0].normalized_shape == (2,)
    assert (module[1].num_groups, module[1].num_channels) == (3, 3)
    with pytest.raises(EdgegenError, match="does not have"):
        reduce(module, Pruning.of({"0.eps": {0: [0]}}), weights=True)


@pytest.mark.parametrize(
    ("positions", "groups"),
    [
        ([0, 1, 2, 3], 2),  # two of four groups, whole
        ([0, 2, 4, 6], 4),  # one channel of each
        ([0, 2, 4], 3),
        ([0, 1, 2], 3),  # not equally many: as many groups as divide what is left
        ([0, 1, 2, 4, 6], 1),
    ],
)
def test_groups_of_a_norm_follow_the_channels_that_are_left(positions, groups):
    assert norm_groups(torch.tensor(positions), 8, 4) == groups


def test_what_stands_for_a_module_answers_as_diffusers_asks():
    x = torch.randn(2, 3)
    assert Passed("identity")(x, None) is x
    assert torch.equal(Passed("zero")(hidden_states=x), torch.zeros(2, 3))
    assert Passed("identity")(x, return_dict=False) == (x,)
