"""Manifests that were written before students could start from pictures are read as they were meant."""

import pytest
from pydantic import ValidationError

from edgegen.bundle.manifest import Fixture

REST = {
    "prompt": "a red circle",
    "seed": 0,
    "steps": 1,
    "noise": "n.npy",
    "predictions": ["p.npy"],
    "latents": ["l.npy"],
    "image": "i.npy",
    "picture": "p.png",
}
OTHER = {"prompt": "a blue square", "predictions": ["q.npy"]}


def test_a_fixture_of_text_alone():
    old = {**REST, "input_ids": "ids.npy", "context": "c.npy", "other": {**OTHER, "input_ids": "b.npy"}}
    new = {**REST, "inputs": {"input_ids": "ids.npy"}, "conditioning": {"context": "c.npy"}}
    new["other"] = {**OTHER, "inputs": {"input_ids": "b.npy"}}
    assert Fixture.model_validate(old) == Fixture.model_validate(new)


@pytest.mark.parametrize(
    "change",
    [
        {"input_ids": "ids.npy"},
        {"inputs": {}, "conditioning": {"context": "c.npy"}},
        {"inputs": {"input_ids": "a.npy", "image": "b.npy"}, "conditioning": {"context": "c.npy"}},
        {"inputs": {"image": "a.npy"}, "conditioning": {}},
        {"inputs": {"image": "a.npy"}, "conditioning": {"context": "c.npy"}, "context": "c.npy"},
    ],
)
def test_what_is_neither(change):
    with pytest.raises(ValidationError):
        Fixture.model_validate({**REST, **change})
