"""Dense convolutions made separable: what is chosen, what is kept, and that nothing is lost where nothing need be."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgegen.cache import Cache
from edgegen.errors import EdgegenError, GateError, UsageError
from edgegen.graph.capture import capture
from edgegen.graph.count import count
from edgegen.prune.apply import pruned
from edgegen.prune.command import prune
from edgegen.prune.heal import between
from edgegen.prune.options import PruneOptions
from edgegen.prune.separable import Separation, choose, separations
from edgegen.prune.trial import Trial
from edgegen.students.checkpoint import save_pt
from edgegen.students.load import load
from edgegen.students.networks.separable_conv import separable, separated
from edgegen.students.pruning import Pruning
from edgegen.students.reduce import reduce
from edgegen.students.shapes import family
from edgegen.targets import load_target
from tests.silent import Silent


@pytest.fixture(scope="module")
def shapes():
    return load(family.WEIGHTS)


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"bias": False}, {"padding": (2, 0)}],
    ids=str,
)
def test_as_many_filters_as_taps_lose_nothing(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3, **options)
    x = torch.randn(2, 5, 12, 12)
    errors = []
    for rank in (1, 3, 9):
        made = separated(conv, rank, weights=True)
        errors.append(float((made(x) - conv(x)).square().mean() / conv(x).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10


def test_a_rank_beyond_the_taps_is_as_good_as_all():
    conv = nn.Conv2d(3, 4, (1, 3))
    x = torch.randn(1, 3, 5, 8)
    torch.testing.assert_close(separated(conv, 5, weights=True)(x), conv(x))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Conv2d(4, 4, 1), "1x1"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "reflect"),
        (nn.ConvTranspose2d(4, 4, 3), "no two-dimensional convolution"),
        (nn.Linear(4, 4), "no two-dimensional convolution"),
    ],
)
def test_what_stays_as_it_is(module, why):
    assert why in separable(module)


def test_the_choice_is_the_best_there_is():
    generator = np.random.default_rng(0)
    for _ in range(20):
        found = []
        for index in range(4):
            losses = np.sort(generator.random(3))[::-1]
            found.append(Separation(f"c{index}", (1, 2, 3), (100, 10, 25, 40), (0.0, *map(float, losses))))
        save = float(generator.uniform(50, 330))
        best = min(
            sum(one.losses[place] for one, place in zip(found, places, strict=True))
            for places in itertools.product(range(4), repeat=4)
            if sum(one.macs[0] - one.macs[place] for one, place in zip(found, places, strict=True)) >= save
        )
        chosen = choose(found, save)
        lost = sum(one.losses[one.ranks.index(chosen[one.path]) + 1] for one in found if one.path in chosen)
        assert lost == pytest.approx(best)
    with pytest.raises(GateError, match="360 MACs at most"):
        choose(found, 361)


def test_the_first_and_the_last_convolution_stay(shapes):
    found = {one.path for one in separations(shapes.components["decoder"])}
    assert found
    assert "layers.0" not in found and "layers.11" not in found


def test_macs_are_those_of_the_graph(shapes):
    part = shapes.components["decoder"]
    one = separations(part)[2]
    for rank, macs in zip(one.ranks, one.macs[1:], strict=True):
        left = pruned(shapes, {"decoder": Pruning(separated={one.path: rank})}).components["decoder"]
        assert count(capture(part)).macs - count(capture(left)).macs == one.macs[0] - macs


def test_saved_loaded_cut_and_loaded_again(shapes, tmp_path):
    """Channels are cut out of what was separated, and a convolution whose channels were cut is separated."""
    paths = [one.path for one in separations(shapes.components["decoder"])][:2]
    trial = Trial.of(shapes, samples=2)
    made = pruned(shapes, {"decoder": Pruning(separated={paths[0]: 3})})
    made = pruned(
        made,
        {
            "decoder": Pruning.of(
                {
                    f"{paths[0]}.pointwise.weight": {0: range(0, 48, 2)},
                    f"{paths[0]}.pointwise.bias": {0: range(0, 48, 2)},
                    f"{paths[1]}.weight": {1: range(0, 48, 2)},
                }
            )
        },
    )
    assert paths[1] == paths[0].replace(".0", ".2")
    last = pruned(made, {"decoder": Pruning(separated={paths[1]: 2})})
    record = last.config.components["decoder"].pruning
    assert record.separated == {paths[0]: 3, paths[1]: 2}
    assert f"{paths[1]}.weight" not in record.cuts
    assert record.positions(f"{paths[1]}.depthwise.weight", 0)[:4] == (0, 1, 4, 5)
    save_pt(last, tmp_path / "last.pt")
    again = load(tmp_path / "last.pt")
    assert torch.equal(trial.drawn(again), trial.drawn(last))
    assert between(made.config.components["decoder"].pruning, record).separated == {paths[1]: 2}


def test_latency_beside_separable_convolutions_is_a_share_of_the_dense_student(tiny, tmp_path):
    target, options = (
        load_target("linux-x86"),
        PruneOptions(separable={"decoder": 0.8}, samples=2, steps=1, measure=False),
    )
    wide = prune(tiny, target, ("onnx",), options, Cache(tmp_path), Silent())
    narrow = prune(tiny, target, ("onnx",), replace(options, max_latency=0.7), Cache(tmp_path), Silent())
    assert wide.prunings == {} and wide.latency["onnx"][1] != wide.latency["onnx"][0]
    before, after = narrow.latency["onnx"]
    assert before == pytest.approx(wide.latency["onnx"][0], rel=0.05), "what it had when it was dense"
    assert after <= 0.7 * before * (1 + 1e-6)
    parts = {part.name: part for part in narrow.parts}
    assert (
        parts["decoder"].separated and parts["decoder"].before.macs == count(capture(tiny.components["decoder"])).macs
    )


def test_records_that_do_not_fit(shapes):
    decoder = shapes.components["decoder"].module
    for path, why in (("layers.99", "does not have"), ("layers.1", "no two-dimensional convolution")):
        with pytest.raises(EdgegenError, match=why):
            reduce(decoder, Pruning(separated={path: 1}), weights=False)
    with pytest.raises(ValueError, match="0 filters"):
        Pruning(separated={"layers.0": 0})
    one = Pruning(separated={"layers.2.conv.0": 1})
    with pytest.raises(EdgegenError, match="separated already"):
        one.then(one)


def test_an_old_record_is_written_as_before():
    assert "separated" not in Pruning(removed={"a": "zero"}).model_dump_json()


def test_a_component_without_wide_convolutions(shapes):
    from edgegen.prune.separable import separate

    with pytest.raises(UsageError, match="nothing of component `text_encoder`"):
        separate(shapes, {"text_encoder": 0.5}, Trial.of(shapes, samples=2))
