"""Ranges: what is observed, how it is summed up, and what is refused."""

import dataclasses
import math
import tomllib
from pathlib import Path

import pytest
import torch

import edgegen
from edgegen.cache import Cache
from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.evaluate import evaluate
from edgegen.precision.calibrate import affordable, calibrate, calibrate_once
from edgegen.precision.encode import activation_qparams, grid
from edgegen.precision.histogram import Histogram
from edgegen.precision.prompts import (
    check_prompts,
    data_folder,
    default_settings,
    prompts_for,
    read_prompts,
)
from edgegen.precision.quantize import tail
from edgegen.precision.sites import sites
from edgegen.students.shapes.grammar import held_back
from edgegen.verify.reference import trajectory

FEW = default_settings().model_copy(update={"fewest": 2, "observer": "minmax", "seed": 7})
PROMPTS = ("a small red circle on the left", "a large blue square above a small green triangle")


@pytest.fixture(scope="module")
def ranges(tiny, tiny_programs):
    return calibrate(tiny, tiny_programs, PROMPTS, FEW)


def test_every_site_of_every_component_has_ranges(ranges, tiny_programs):
    for name, program in tiny_programs.items():
        assert set(ranges.components[name]) == set(sites(program))
    assert ranges.calibration.prompts == 2 and ranges.calibration.steps == (1, 2)


def test_ranges_are_those_of_the_students_own_trajectory(ranges, tiny, tiny_programs):
    latents, decoded = [], []
    for index, prompt in enumerate(PROMPTS):
        for steps in (1, 2):
            drawn = trajectory(tiny, prompt, FEW.seed + index, steps)
            latents += [step.model_input for step in drawn.steps]
            decoded.append(drawn.decoder_input)
    conv_in = ranges.components["denoiser"]["conv_in"].input
    assert conv_in.low == pytest.approx(min(one.min() for one in latents), abs=1e-5)
    assert conv_in.high == pytest.approx(max(one.max() for one in latents), abs=1e-5)
    program = tiny_programs["decoder"]
    first = next(iter(sites(program).values()))
    seen = []

    def watch(node, value):
        if node.name == first.node:
            seen.append(value)

    for value in decoded:
        evaluate(program, {"latent": torch.from_numpy(value)}, watch)
    output = ranges.components["decoder"][first.key].output
    assert output.high == pytest.approx(max(float(one.max()) for one in seen), abs=1e-4)
    behind = tail(next(node for node in program.graph.nodes if node.name == first.node))
    assert behind.target is torch.ops.aten.relu.default and output.low == 0


def test_what_several_ops_read_has_one_range(ranges):
    found = ranges.components["denoiser"]
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    q, k, v = (found[f"{path}.{name}"].input for name in ("to_q", "to_k", "to_v"))
    assert q == k == v


def test_ranges_are_kept_for_each_timestep_where_they_disagree(tiny, tiny_programs):
    # The first step starts from noise, the second from a latent that is half decided.
    always = calibrate(tiny, tiny_programs, PROMPTS, FEW.model_copy(update={"disagreement": 1.0}))
    never = calibrate(tiny, tiny_programs, PROMPTS, FEW.model_copy(update={"disagreement": 1e6}))
    one = always.components["denoiser"]["conv_in"]
    assert len(one.step_inputs) == len(tiny.config.sampler.timesteps()) == 2
    assert one.input.low == min(step.low for step in one.step_inputs)
    assert not any(found.step_inputs for found in never.components["denoiser"].values())
    assert not any(found.step_inputs for found in always.components["decoder"].values())


def test_what_was_observed_is_not_observed_again(tiny, tiny_programs, ranges, tmp_path):
    drawn = []

    def once(settings=FEW, prompts=PROMPTS):
        passes = dict.fromkeys(tiny_programs, "canonical")
        return calibrate_once(
            tiny, tiny_programs, passes, prompts, settings, cache, "0", done=lambda n, of: drawn.append((n, of))
        )

    cache = Cache(tmp_path)
    assert once() == ranges and drawn == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert once() == ranges and len(drawn) == 4
    other = once(FEW.model_copy(update={"seed": 8}))
    assert len(drawn) == 8 and other.calibration.sha256 != ranges.calibration.sha256
    once(prompts=PROMPTS[::-1])
    assert len(drawn) == 12


def test_a_value_that_is_not_finite_is_named_with_its_op_and_prompt(tiny, tiny_programs):
    from edgegen.graph.edit import Editor

    site = sites(tiny_programs["denoiser"])["up_blocks.0.resnets.0.conv1"]
    editor = Editor(tiny_programs["denoiser"], "test")
    (weight,) = (node for node in editor.graph.nodes if node.name == site.weight)
    editor.set_weight(weight, editor.value(weight) * torch.inf)
    broken = {**tiny_programs, "denoiser": editor.finish()}
    with pytest.raises(
        EdgegenError, match=r"`up_blocks.0.resnets.0.conv1` of `denoiser` gives NaN .*red circle.*step 1"
    ):
        calibrate(tiny, broken, PROMPTS, FEW)


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        (PROMPTS[:1], "calibration has 1 different prompts, and fewer than 2"),
        (PROMPTS[:1] * 5, "calibration has 1 different prompts"),
        ((), "calibration has 0"),
        ((*PROMPTS, "  "), "prompt 3, '  ': it is empty"),
        ((*PROMPTS, "a small\x00circle"), "control or replacement"),
        ((*PROMPTS, "a" * 3000), "longer than 2000 letters"),
        ((*PROMPTS, "Lisbon at dusk"), "does not know its words"),
    ],
)
def test_too_few_and_broken_prompts_are_refused(tiny, tiny_programs, prompts, reason):
    with pytest.raises(UsageError, match=reason):
        calibrate(tiny, tiny_programs, prompts, FEW)


def test_steps_that_the_student_does_not_serve_are_refused(tiny, tiny_programs):
    with pytest.raises(UsageError, match="was not distilled for 3 steps"):
        calibrate(tiny, tiny_programs, PROMPTS, FEW, steps=(3,))


def test_a_single_network_is_observed_on_its_example_inputs(tiny, tiny_programs):
    config = tiny.config.model_copy(update={"sampler": None, "task": "single", "latent": None})
    single = dataclasses.replace(tiny, config=config)
    found = calibrate(single, {"decoder": tiny_programs["decoder"]}, (), FEW)
    assert set(found.components) == {"decoder"} and found.calibration.steps == ()


def test_a_student_of_many_multiplications_draws_fewer(tiny, tiny_programs):
    settings = default_settings()
    assert affordable(tiny_programs, (1, 2), settings) == settings.prompts
    assert affordable(tiny_programs, (1, 2), settings.model_copy(update={"macs": 1})) == settings.fewest


def test_prompts_that_ship(shapes, tiny):
    hidden = {scene.prompt() for scene in held_back()} | set(shapes.config.example_prompts)
    own, general = (read_prompts(data_folder() / f"{name}.txt") for name in ("shapes", "general"))
    assert prompts_for(shapes) == own and not hidden & set(own)
    assert prompts_for(tiny) == own  # its tokenizer knows no other
    for prompts in (own, general):
        assert len(set(prompts)) == len(prompts) == 64
        assert default_settings().fewest <= default_settings().prompts <= len(prompts)
    assert check_prompts(shapes, own, 64) == own
    # Far from the seeds that pictures are judged on.
    assert default_settings().seed > 10 * len(held_back())


def test_the_prompts_go_into_the_wheel():
    root = Path(edgegen.__file__).parents[1]
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["calibration"] == "edgegen/_data/calibration"
    assert data_folder() == root / "calibration"


def test_files_of_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# ours\n\n a red fox \nein Fuchs im Schnee\n")
    assert read_prompts(path) == ("a red fox", "ein Fuchs im Schnee")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8") as broken:
        read_prompts(path)
    with pytest.raises(UsageError, match="cannot be read") as missing:
        read_prompts(tmp_path / "nowhere.txt")
    assert all("`--calibration prompts.txt`" in (one.value.hint or "") for one in (broken, missing))


def seen(*tensors):
    histogram = Histogram()
    for tensor in tensors:
        assert histogram.see(tensor)
    return histogram


def test_a_histogram_does_not_mind_the_order_in_which_values_come():
    values = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1], [30], [4]])
    one, other = seen(*values), seen(*values.flip(0))
    assert (one.low, one.high) == (other.low, other.high) == (float(values.min()), float(values.max()))
    ranges = [h.range() for h in (one, other)]
    assert ranges[0].low == pytest.approx(ranges[1].low, rel=0.05)
    merged = Histogram()
    for value in values:
        merged.add(seen(value))
    merged.add(Histogram())
    assert merged.range() == one.range()


@pytest.mark.parametrize("shape", ["normal", "outlier", "relu", "uniform", "heavy"])
def test_the_chosen_range_has_near_the_least_squared_error(shape):
    values = torch.randn(20000, generator=torch.Generator().manual_seed(1))
    values = {
        "normal": values,
        "outlier": torch.cat([values, torch.tensor([60.0])]),
        "relu": values.relu(),
        "uniform": values.sort().values.argsort().float() / 20000 - 0.3,
        "heavy": values**5,
    }[shape]

    def error(range):
        scale, zero = activation_qparams(range)
        return float((torch.fake_quantize_per_tensor_affine(values, scale, zero, -128, 127) - values).square().mean())

    histogram = seen(values)
    whole, chosen = histogram.range("minmax"), histogram.range("mse")
    assert (whole.low, whole.high) == (float(values.min()), float(values.max()))
    best = min(
        error(whole.model_copy(update={"low": a * whole.low, "high": b * whole.high}))
        for a in (1, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)
        for b in (1, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0.05)
    )
    assert error(chosen) <= 1.1 * best and error(chosen) <= 1.001 * error(whole)
    assert grid(activation_qparams(chosen)).low <= 0


def test_nothing_and_what_is_not_finite():
    histogram = Histogram()
    with pytest.raises(ValueError, match="nothing was seen"):
        histogram.range()
    assert not histogram.see(torch.tensor([1.0, math.nan])) and not histogram.see(torch.tensor([-math.inf]))
    assert histogram.see(torch.zeros(0)) and histogram.see(torch.zeros(3))
    assert (histogram.range().low, histogram.range().high) == (0.0, 0.0)
    assert seen(torch.full((5,), 3.0).half()).range().high == 3.0
