"""A config whose parts do not fit together is refused before any memory is spent, with the part that is wrong."""

import copy

import pytest

from edgegen.errors import EdgegenError
from edgegen.students.assembly import parse_config
from edgegen.students.sample import condition, draw
from tests.film import config


@pytest.fixture(scope="module")
def data():
    return config().model_dump()


def part(data, name):
    return data["components"][name]


def spec(name, *shape, dtype="float32"):
    return {"name": name, "shape": shape, "dtype": dtype}


def test_what_fits_is_taken(data):
    made = parse_config(data, "film")
    assert made.conditioning == "image_encoder" and made.conditions == {"flow_score": 1.0}


def test_students_of_one_network_have_no_flow(data):
    alone = {"name": "one", "task": "single", "components": {"model": part(data, "decoder")}}
    assert parse_config(alone, "one").conditioning is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(task="text-to-image"), "needs components `text_encoder`"),
        (lambda d: d.update(sampler=None), "no `sampler`"),
        (lambda d: d.update(latent=None), "no `latent`"),
        (lambda d: d["latent"].update(shape=(16, 2, 2)), "[1, C, T, H, W]"),
        (lambda d: d.update(conditions={}), "takes `flow_score`, which nothing gives"),
        (lambda d: d.update(conditions={"flow_score": 1.0, "timestep": 1.0}), "has a name that is something else's"),
        (lambda d: d.update(conditions={"flow_score": 1.0, "image_latent": 1.0}), "something else's"),
        (lambda d: part(d, "denoiser")["inputs"].append(spec("context", 1, 7, 8)), "takes `context`"),
        (lambda d: part(d, "denoiser")["inputs"][3].update(shape=(1, 1)), "as float32 [1, 1], and is given"),
        (lambda d: part(d, "denoiser")["inputs"].pop(0), "does not take `latent`"),
        (lambda d: part(d, "denoiser")["outputs"][0].update(shape=(1, 16, 2, 2, 3)), "shaped as its latent"),
        (lambda d: part(d, "decoder")["inputs"][0].update(shape=(1, 16, 2, 2, 3)), "not the latent"),
        (lambda d: part(d, "decoder")["outputs"][0].update(name="image"), "`video` [1, 3, T, H, W]"),
        (lambda d: part(d, "image_encoder")["inputs"][0].update(shape=(1, 4, 64, 64)), "`image` float32 [1, 3, H, W]"),
        (lambda d: part(d, "image_encoder")["inputs"].append(spec("more", 1)), "and nothing else"),
        (lambda d: part(d, "image_encoder")["outputs"][0].update(name="latent"), "something else's"),
    ],
)
def test_what_does_not_fit_is_named(data, change, said):
    broken = copy.deepcopy(data)
    for one in broken["components"].values():
        one["inputs"], one["outputs"] = list(one["inputs"]), list(one["outputs"])
    change(broken)
    with pytest.raises(EdgegenError) as caught:
        parse_config(broken, "film")
    assert said in caught.value.message


def test_rows_of_a_batch_do_not_meet(film):
    names, seeds = ["example picture 1", "a second"], [3, 4]
    both = condition(film, film.given(names))
    assert both["flow_score"].shape == (2,) and both["image_latent"].shape[0] == 2
    alone = draw(film, names[1:], seeds[1:], 1)
    assert alone.shape == (1, 3, 9, 64, 64)
    assert not (draw(film, names[:1], seeds[1:], 1) == alone).all()
