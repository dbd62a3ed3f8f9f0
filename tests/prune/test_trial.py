"""Students of films: networks that take one at a time are tried, judged and healed one at a time."""

import pytest

from edgegen.cache import Cache
from edgegen.errors import EdgegenError
from edgegen.graph.capture import capture
from edgegen.prune.apply import pruned
from edgegen.prune.assemble import level_loss
from edgegen.prune.depth import blocks, effects
from edgegen.prune.find import spaces
from edgegen.prune.heal import HealOptions, heal
from edgegen.prune.space import to_pruning
from edgegen.prune.trial import Trial
from edgegen.students.families.registry import new
from edgegen.students.pruning import Pruning
from tests.silent import Silent


@pytest.fixture(scope="module")
def films():
    return new("mobilei2v", "tiny")


@pytest.fixture(scope="module")
def trial(films):
    return Trial.of(films, steps=1, samples=2)


@pytest.fixture(scope="module")
def decoder_spaces(films):
    return spaces(capture(films.components["decoder"]))


def every_other(found, names):
    kept = {one.name: list(range(0, one.count, 2)) for one in found.spaces if one.name in names}
    return to_pruning(found, kept)


def test_a_film_is_drawn_for_every_sample(films, trial):
    assert len(trial.pictures) == 2
    assert not trial.pictures[0].equal(trial.pictures[1])
    assert trial.loss(films) == 0.0


def test_the_upsamplers_channels_are_cut_alone(trial, decoder_spaces):
    """What an upsampler reads and what it writes are units of different spaces."""
    names = [one.name for one in decoder_spaces.spaces if any("upsamplers" in cut.parameter for cut in one.cuts)]
    assert len(names) > 1
    for name in names:
        assert level_loss(trial, "decoder", every_other(decoder_spaces, {name})) > 0


def test_a_network_that_does_not_follow_is_named(trial, decoder_spaces):
    """Half of a space: what writes the channels loses some, what reads them does not."""
    space = max(decoder_spaces.spaces, key=lambda one: len(one.cuts))
    writes = space.writes[0]
    cuts = {writes.parameter: {writes.dim: list(range(trial_size(trial, writes.parameter, writes.dim) - 1))}}
    with pytest.raises(EdgegenError, match="`decoder` does not follow what is cut out of it"):
        level_loss(trial, "decoder", Pruning.of(cuts))


def trial_size(trial, name, dim):
    return dict(trial.student.components["decoder"].module.named_parameters())[name].shape[dim]


def test_blocks_have_effects(films, trial):
    found = [
        one
        for name in ("denoiser", "decoder")
        for one in blocks(films.components[name], capture(films.components[name]))
    ]
    known = effects(trial, found, probes=1)
    assert set(known) == {one.name for one in found}
    assert all(one.picture >= 0 and 0 <= one.similarity <= 1 + 1e-9 for one in known.values())
    assert any(one.picture > 0 for one in known.values())


def test_a_student_of_films_is_healed(films, decoder_spaces, tmp_path):
    cut = pruned(films, {"decoder": every_other(decoder_spaces, {decoder_spaces.spaces[0].name})})
    made = heal(films, cut, HealOptions(steps=2, batch=2), Cache(tmp_path), Silent())
    assert [(one.component, one.course.step) for one in made.lessons] == [("decoder", 2)]
    assert made.student.config == cut.config and made.student.fingerprint != cut.fingerprint
