"""The whole problem of a student: its sums against the networks that its choices give."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgegen.cache import Cache
from edgegen.cli.console import Output
from edgegen.errors import UsageError
from edgegen.graph.capture import capture
from edgegen.graph.count import count
from edgegen.prune.assemble import Options, assemble
from edgegen.prune.bench import Point
from edgegen.prune.cost import Surface, points, surface
from edgegen.prune.kernels import Kernel, kernel_of
from edgegen.prune.search import Choice, search, total
from edgegen.targets import load_target
from tests.prune import by_hand


def assembled(student, cache, **options):
    names = options.get("components", ("denoiser", "decoder"))
    modules = iter([student.components[name].module for name in names if name in student.components])
    with Output(quiet=True).progress() as progress:
        return assemble(
            student,
            load_target("linux-x86"),
            (),
            Options(samples=2, shares=(1.0, 0.5, 0.25), **options),
            lambda program: by_hand.spaces(next(modules)),
            by_hand.magnitudes,
            cache,
            progress,
        )


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    return assembled(tiny, Cache(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("seed", range(4))
def test_macs_and_bytes_are_those_of_the_network_that_comes_out(made, seed):
    rng = np.random.default_rng(seed)
    problem = made.problem
    levels = {one.name: int(rng.integers(one.levels)) for one in problem.ladders}
    removed = ()
    if seed % 2:
        removed = (sorted(one.name for one in problem.removals if one.name.endswith("attn2"))[0],)
    gone = {name for one in problem.removals if one.name in removed for name in one.works}
    options = {one.name: None if one.name in gone else "fp32" for one in problem.works}
    choice = Choice(levels, options, removed, total(problem, levels, options, removed))
    student = made.pruned(choice)
    assert student.config.components["denoiser"].pruning is not None
    held = 0
    for name, part in student.components.items():
        found = count(capture(part))
        assert choice.totals[f"macs {name}"] == pytest.approx(found.macs)
        held += sum(value.numel() * 4 for value in part.module.state_dict().values())
    calls = {"denoiser": 2}
    whole = sum(calls.get(name, 1) * choice.totals[f"macs {name}"] for name in student.components)
    assert choice.totals["macs"] == pytest.approx(whole)
    assert choice.totals["bytes"] == pytest.approx(held, rel=1e-3)  # norms of what is passed by are counted still


def test_a_search_keeps_to_its_budget_and_what_it_gives_draws(made):
    whole = made.whole.totals
    caps = {"macs denoiser": 0.7 * whole["macs denoiser"], "macs decoder": 0.8 * whole["macs decoder"]}
    found = search(replace(made.problem, caps=caps, minimise={"picture": 1.0}))
    student = made.pruned(found)
    for name in ("denoiser", "decoder"):
        assert count(capture(student.components[name])).macs <= caps[f"macs {name}"] * (1 + 1e-6)
    assert torch.isfinite(made.trial.drawn(student)).all()
    assert made.precisions(found) == {}


def test_losses_of_levels_are_measured_and_never_fall_as_more_is_cut(made):
    for ladder in made.problem.ladders:
        losses = ladder.losses["picture"]
        assert losses[0] == 0.0
        assert list(losses) == sorted(losses)
    assert any(ladder.losses["picture"][-1] > 0 for ladder in made.problem.ladders)


def test_a_component_that_is_not_there_is_named(tiny, tmp_path):
    with pytest.raises(UsageError, match="no component `mask`"):
        assembled(tiny, Cache(tmp_path), components=("mask",))


def test_a_surface_goes_through_times_that_are_one_and_never_falls():
    kernel = Kernel(kind="conv", sizes=(3, 3, 1, 16, 16))
    truth = Surface(0.002, 1e-5, 2e-5, 3e-7, 0.0)
    grid = points(kernel, 96, 64, 8)
    found = surface({one: truth(one.read, one.written) for one in grid})
    assert found.error < 1e-6
    assert found(40, 24) == pytest.approx(truth(40, 24))
    rng = np.random.default_rng(0)
    noisy = surface({one: truth(one.read, one.written) * rng.uniform(0.5, 2.0) for one in grid})
    assert noisy.error > 0.05
    widths = range(8, 129, 8)
    for other in widths:
        across = [noisy(one, other) for one in widths]
        down = [noisy(other, one) for one in widths]
        assert across == sorted(across)
        assert down == sorted(down)


def test_points_are_widths_that_a_kernel_may_have():
    norm = Kernel(kind="group_norm", sizes=(256, 16))
    assert {one.written % 16 for one in points(norm, 96, 96, 8)} == {0}
    assert all(one.read == one.written for one in points(norm, 96, 96, 8))
    linear = points(Kernel(kind="linear", sizes=(64,)), 128, 512, 32)
    assert all(one.read % 32 == one.written % 32 == 0 for one in linear)
    assert Point(kernel=Kernel(kind="linear", sizes=(64,)), read=128, written=512) in linear


def test_every_op_with_macs_has_a_kernel_on_shapes(shapes):
    from edgegen.graph.count import macs_of

    for part in shapes.components.values():
        for node in capture(part).graph.nodes:
            if node.op == "call_function" and macs_of(node):
                assert kernel_of(node) is not None, node
