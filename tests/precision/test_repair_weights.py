"""Repairs of weights: the same function in float, less noise in integers, and what they refuse."""

import pytest
import torch
from planted import exported, network, plan, planted

from edgegen.errors import EdgegenError
from edgegen.precision.encode import encode_weight
from edgegen.precision.plan import ComponentPlan, OpPlan
from edgegen.precision.repair import tensors as repaired_tensors
from edgegen.precision.repair.bias_correction import correct_biases
from edgegen.precision.repair.equalise import equalise, find_pairs
from edgegen.precision.repair.outliers import find_outliers, kept_high
from edgegen.precision.repair.round_weights import round_weights
from edgegen.precision.repair.tensors import apply, quality_db, quantized_db
from edgegen.precision.sites import sites


@pytest.fixture(scope="module")
def plain():
    module, samples = network()
    return module, exported(module, samples), samples


@pytest.fixture(scope="module")
def wide(plain):
    """With planted outliers, and what whole-int8 makes of it without a thought."""
    module, _, samples = plain
    return exported(planted(module), samples), samples


def test_planting_changes_no_number_and_breaks_int8(plain, wide):
    _, program, samples = plain
    assert quality_db(program, wide[0], samples) > 90
    healthy = quantized_db(program, program, plan(program, samples), samples)
    naive = quantized_db(wide[0], wide[0], plan(wide[0], samples), samples)
    assert naive < healthy - 8


def test_equalisation_is_exact_and_recovers_what_outliers_took(wide):
    program, samples = wide
    repaired = equalise(program, samples)
    assert repaired.record.after_db > 90
    naive = quantized_db(program, program, plan(program, samples), samples)
    mended = quantized_db(program, repaired.program, plan(repaired.program, samples), samples)
    assert mended >= naive + 8
    assert {"conv1", "conv2", "conv3", "feed.value", "feed.out"} <= set(repaired.record.changed)
    assert "silu" in repaired.record.declined["silu_conv"]


def test_equalisation_names_calls_and_keeps_the_graph(wide):
    program, samples = wide
    first, second = equalise(program, samples), equalise(program, samples)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    names = [[node.name for node in one.graph.nodes if node.op == "call_function"] for one in (program, first.program)]
    assert names[0] == names[1]
    assert list(sites(first.program)) == list(sites(program))


def test_even_channels_are_left(plain):
    _, program, samples = plain
    found, _ = find_pairs(program)
    repaired = equalise(program, samples)
    assert len(repaired.record.changed) < sum(1 + len(pair.readers) for pair in found)


def test_rounding_beats_the_nearest_and_stays_on_the_grid(plain):
    _, program, samples = plain
    ops = plan(program, samples, "w4", group=0)
    made = round_weights(program, ops, samples[:4])
    assert made.record.after_db >= made.record.before_db + 1.5
    # Inputs that were not learned from gain as well.
    fresh = [quantized_db(program, one, ops, samples[4:]) for one in (program, made.program)]
    assert fresh[1] > fresh[0] + 0.75
    for name, weight in made.tensors.items():
        decoded = encode_weight(weight, ops[name.partition(":")[0]]).decode()
        assert torch.equal(decoded, weight)


@pytest.mark.parametrize(("precision", "group"), [("w8", 0), ("w4", 16)])
def test_rounding_with_other_grids(plain, precision, group):
    _, program, samples = plain
    skip = ("conv_in",) if group else ()
    ops = plan(program, samples, precision, skip, group=group)
    made = round_weights(program, ops, samples[:3])
    assert made.record.after_db > made.record.before_db
    for name, weight in made.tensors.items():
        assert torch.equal(encode_weight(weight, ops[name.partition(":")[0]]).decode(), weight)


def test_rounding_in_small_blocks_still_gains(plain, monkeypatch):
    from edgegen.precision.repair import round_weights as module

    _, program, samples = plain
    monkeypatch.setattr(module, "BLOCK", 50)  # divides no layer's inputs
    made = round_weights(program, plan(program, samples, "w4"), samples[:3])
    assert made.record.after_db > made.record.before_db


def test_biases_take_the_mean_error_off(plain):
    _, program, samples = plain
    ops = plan(program, samples, "w4")
    made = correct_biases(program, program, ops, samples[:4], samples[4:])
    assert made.record.after_db > made.record.before_db
    assert any(name.endswith(":2") for name in made.tensors)
    assert "conv3" in made.record.changed  # which had no bias
    assert list(sites(made.program)) == list(sites(program))


def test_biases_after_rounding_are_held_against_the_float_graph(plain):
    _, program, samples = plain
    ops = plan(program, samples, "w4")
    rounded = round_weights(program, ops, samples[:4])
    made = correct_biases(program, rounded.program, ops, samples[:4])
    assert made.record.before_db == pytest.approx(rounded.record.after_db, abs=1.5)
    assert made.record.after_db >= made.record.before_db
    again = apply(program, {**rounded.tensors, **made.tensors})
    assert quality_db(made.program, again, samples) == float("inf")


def test_biases_that_would_be_worse_stay(plain):
    """Learned from a sample far from those that judge."""
    _, program, samples = plain
    far = [{"latent": 40 + 40 * torch.randn(1, 4, 16, 16)}]
    made = correct_biases(program, program, plan(program, samples), far, samples)
    assert made.tensors == {} and made.program is program
    assert made.record.after_db == made.record.before_db and "whole graph" in made.record.declined[""]


def test_outliers_are_found_where_they_were_planted(plain, wide):
    program, samples = wide
    found = find_outliers(program, samples)
    assert {"conv2", "conv3", "feed.out"} <= set(found)
    assert all(3 in found[key].channels for key in ("conv2", "conv3", "feed.out"))
    assert not {"silu_conv", "conv_out", "feed.gate"} & set(found)
    assert find_outliers(plain[1], samples) == {}
    ops = plan(program, samples)
    by_key = {key: ops[site.node] for key, site in sites(program).items()}
    high = kept_high(ComponentPlan(float_precision="fp32", ops=by_key), found)
    assert high.ops["conv2"].precision == "fp32" and high.ops["conv_out"].precision == "w8a8"
    calls = {site.node: high.ops[key] for key, site in sites(program).items()}
    assert quantized_db(program, program, calls, samples) > quantized_db(program, program, ops, samples) + 8


def test_tensors_are_saved_checked_and_applied(wide, tmp_path):
    program, samples = wide
    made = equalise(program, samples)
    sha = repaired_tensors.save(tmp_path / "repair.safetensors", made.tensors)
    assert sha == repaired_tensors.save(tmp_path / "again.safetensors", dict(reversed(made.tensors.items())))
    again = apply(program, repaired_tensors.load(tmp_path / "repair.safetensors", sha))
    assert quality_db(made.program, again, samples) == float("inf")
    with pytest.raises(EdgegenError, match="not the file"):
        repaired_tensors.load(tmp_path / "repair.safetensors", "0" * 64)


@pytest.mark.parametrize(
    ("name", "shape"), [("conv2d_99:1", (4, 4)), ("conv2d_1:weight", (4, 4)), ("conv2d_1:1", (4, 4))]
)
def test_tensors_of_another_graph_are_refused(plain, name, shape):
    with pytest.raises(EdgegenError, match="conv2d_"):
        apply(plain[1], {name: torch.zeros(shape)})


def test_what_cannot_be_rounded_is_named(plain):
    _, program, samples = plain
    ops = {"conv2d_1": OpPlan(op="conv", precision="w4", form="palette")}
    made = round_weights(program, ops, samples[:1])
    assert made.tensors == {} and "palette" in made.record.declined["conv1"]
