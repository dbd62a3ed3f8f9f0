import dataclasses

import numpy as np
import pytest

from edgegen.students.shapes.grammar import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    held_back,
    one_object_scenes,
)
from edgegen.students.shapes.judge import alignment, look, shows
from edgegen.students.shapes.render import render, render_batch


@pytest.fixture(scope="module")
def truth():
    scenes = list(held_back())
    return scenes, render_batch(scenes, np.random.default_rng(0))


def test_truth_is_judged_right(truth):
    scenes, pictures = truth
    assert alignment(pictures, scenes) >= 0.995


def test_other_peoples_prompts_are_judged_wrong(truth):
    scenes, pictures = truth
    assert alignment(pictures, scenes[7:] + scenes[:7]) < 0.02


def swap(options, value):
    return options[(options.index(value) + 1) % len(options)]


@pytest.mark.parametrize("field, options", [("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)])
def test_one_wrong_attribute_is_enough(truth, field, options):
    scenes, pictures = truth
    for scene, picture in zip(scenes, pictures, strict=True):
        thing = scene.things[-1]
        wrong = dataclasses.replace(thing, **{field: swap(options, getattr(thing, field))})
        assert not shows(picture, dataclasses.replace(scene, things=(*scene.things[:-1], wrong)))


def test_wrong_place_relation_and_count(truth):
    scenes, pictures = truth
    for scene, picture in zip(scenes, pictures, strict=True):
        if scene.relation is None:
            other = next(s.place for s in one_object_scenes() if s.place != scene.place)
            assert not shows(picture, dataclasses.replace(scene, place=other))
        else:
            if scene.things[0] != scene.things[1]:
                assert not shows(picture, dataclasses.replace(scene, things=scene.things[::-1]))
            other = next(name for name in RELATIONS if name != scene.relation)
            assert not shows(picture, dataclasses.replace(scene, relation=other))
            assert not shows(picture, Scene(scene.things[:1], place="in the center"))


def test_a_stray_blob_spoils_a_picture():
    scene = Scene((Thing("large", "red", "circle"),), place="in the center")
    picture = render(scene, np.random.default_rng(0))
    assert shows(picture, scene)
    picture[:, 2:7, 2:7] = -1
    assert not shows(picture, scene)


@pytest.mark.parametrize("fill", [0.0, 1.0, -1.0, np.nan])
def test_empty_grey_black_and_nan_pictures_show_nothing(fill):
    picture = np.full((3, 64, 64), fill, dtype=np.float32)
    assert not any(item for item in look(picture))
    assert alignment([picture], [held_back()[0]]) == 0
