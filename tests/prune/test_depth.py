"""Which blocks may be passed by, and what that is expected to do against what it does."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from edgegen.graph.capture import capture
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.prune.apply import pruned
from edgegen.prune.depth import Effect, blocks, chains, effects, measured, passed_by, runs, similarity
from edgegen.prune.trial import Trial
from edgegen.students.pruning import Pruning
from edgegen.students.student import Component


@pytest.fixture(scope="module")
def trial(shapes):
    return Trial.of(shapes, samples=4)


@pytest.fixture(scope="module")
def found(shapes):
    parts = (shapes.components[name] for name in ("denoiser", "decoder"))
    return [block for part in parts for block in blocks(part, capture(part))]


def ways(module, *shape):
    spec = TensorSpec(name="x", shape=shape)
    with torch.no_grad():
        out = TensorSpec(name="y", shape=tuple(module(torch.zeros(shape)).shape))
    part = Component("model", module.eval(), (spec,), (out,))
    return {one.path: one.way for one in blocks(part, capture(part))}


def test_residual_blocks_give_their_input_and_branches_give_zeros(found):
    of = {block.name: block for block in found}
    assert of["denoiser/down_blocks.0.resnets.0"].way == "identity"
    assert "denoiser/down_blocks.1.resnets.0" not in of  # it changes the width
    transformer = "denoiser/down_blocks.1.attentions.0.transformer_blocks.0"
    assert {part: of[f"{transformer}{part}"].way for part in ("", ".attn1", ".ff")} == {
        "": "identity",
        ".attn1": "zero",
        ".ff": "zero",
    }
    assert of["decoder/layers.3"].after == "layers.2"
    assert not any("conv" in block.path.split(".")[-1] for block in found)


class Plain(nn.Module):
    """A convolution and what comes of it, without a skip."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return F.relu(self.conv(x))


class Gate(nn.Module):
    """A branch that is multiplied, not added."""

    def __init__(self):
        super().__init__()
        self.inner = Plain()

    def forward(self, x):
        return x * self.inner(x)


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Plain(), Plain())

    def forward(self, x):
        return F.relu(x + self.inner(x))


class Strided(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x) + x[:, :, ::2, ::2]


class Twice(nn.Module):
    """One block, called again with what it made."""

    def __init__(self):
        super().__init__()
        self.skip = Skip()

    def forward(self, x):
        return self.skip(self.skip(x))


def test_what_has_no_skip_is_no_block():
    net = nn.Sequential(Plain(), Gate(), Skip(), Strided())
    assert ways(net, 1, 4, 8, 8) == {"2": "identity"}
    assert ways(Twice(), 1, 4, 8, 8) == {}


def test_passing_by_is_what_a_record_of_it_does(shapes, trial, found):
    some = [*[block for block in found if block.path.endswith("attn1")][:2], found[0]]
    record = Pruning.of({}, {block.path: block.way for block in some})
    made = pruned(shapes, {"denoiser": record})
    with passed_by(shapes, some) as student:
        assert torch.allclose(trial.drawn(student), trial.drawn(made), atol=1e-5)
    assert trial.loss(shapes) == 0.0  # and nothing of it stays


def test_estimates_rank_blocks_as_removal_does(trial, found):
    known = effects(trial, found)
    alone = [measured(trial, [block]) for block in found]
    correlation = spearmanr([known[block.name].picture for block in found], alone).statistic
    print(f"rank correlation of first-order estimates with {len(found)} measured removals: {correlation:.3f}")
    assert correlation > 0.5
    assert min(alone) < 1e-6 < 1e-2 < max(alone)  # some do nothing here, some are the picture


def test_runs_are_where_similarity_stops_falling(found):
    chain = [block for block in found if block.path in ("layers.2", "layers.3")]
    assert chains(found)[0] == chain
    flat = {block.name: Effect(0, 0, 0, 0.9) for block in found}
    falling = flat | {chain[0].name: Effect(0, 0, 0, 0.99), chain[1].name: Effect(0, 0, 0, 0.98)}
    assert tuple(chain) in runs(found, falling)  # both fall by 0.01
    assert tuple(chain) not in runs(found, flat)  # all of the fall is at the first


def test_similarity_does_not_see_rotations_and_scales():
    x = torch.randn(64, 8, dtype=torch.float64)
    turned = 3.0 * x @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] + 5.0
    assert similarity(x, turned) == pytest.approx(1.0)
    assert similarity(x, torch.randn(64, 8, dtype=torch.float64)) < 0.5
