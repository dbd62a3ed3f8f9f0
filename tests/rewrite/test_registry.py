"""Passes as text: what is printed is read back, and nothing else is taken for a pass."""

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgegen.errors import UsageError
from edgegen.rewrite.bind_input import BindInput
from edgegen.rewrite.conv1x1_to_linear import Conv1x1ToLinear
from edgegen.rewrite.registry import all_passes, build, get_pass, parse
from edgegen.rewrite.sink_transposes import SinkTransposes
from edgegen.rewrite.specialise_timestep import SpecialiseTimestep


def test_every_pass_says_what_it_does_and_when_it_does_not():
    for name, kind in all_passes().items():
        assert kind.name == name == name.lower() and " " not in name and "_" not in name
        assert kind.__doc__ and dataclasses.fields(kind) is not None
        assert kind.__dataclass_params__.frozen, f"`{name}` can be changed"
        assert kind.__module__.rsplit(".", 1)[1] == name.replace("-", "_"), f"`{name}` is in {kind.__module__}"


def test_defaults_are_printed_as_the_name_and_read_back():
    for name, kind in all_passes().items():
        if all(field.default is not dataclasses.MISSING for field in dataclasses.fields(kind)):
            assert str(kind()) == name
            assert parse(name) == (kind(),)


@pytest.mark.parametrize(
    "one",
    [
        SpecialiseTimestep((999.0, 250.5), index="i"),
        SinkTransposes(images=True),
        Conv1x1ToLinear("everywhere"),
        BindInput('a "quoted", {strange}=name', (1.0, -2.5e-7)),
    ],
)
def test_options_are_printed_and_read_back(one):
    assert parse(str(one)) == (one,)
    assert parse(f" {one} ,sink-transposes,{one}") == (one, SinkTransposes(), one)
    assert hash(parse(str(one))[0]) == hash(one)


@given(st.text(max_size=40), st.lists(st.floats(allow_nan=False), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_text_and_number_is_read_back(text, numbers):
    one = BindInput(text, tuple(numbers))
    assert parse(str(one)) == (one,)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sink-transpose", "there is no pass `sink-transpose`"),
        ("Sink-Transposes", "cannot be read"),
        ("sink-transposes fold-constants", "cannot be read at `fold"),
        ("sink-transposes,, fold-constants", "cannot be read"),
        ("sink-transposes{images=true", "cannot be read"),
        ("sink-transposes{images=true images=true}", "cannot be read at `images"),
        ("sink-transposes{images=true, images=false}", "there twice"),
        ("sink-transposes{images}", "cannot be read"),
        ("sink-transposes{images=yes}", "not JSON"),
        ("sink-transposes{image=true}", "has no option `image`"),
        ("sink-transposes{images=1}", "option `images`"),
        ('sink-transposes{images="true"}', "option `images`"),
        ('conv1x1-to-linear{where="here"}', "option `where`"),
        ("specialise-timestep", "needs its option `values`"),
        ('specialise-timestep{values=["1"]}', "option `values`"),
        ("specialise-timestep{values=1}", "option `values`"),
        ('chunk-queries{max_score_bytes="256"}', "option `max_score_bytes`"),
        ("chunk-queries{max_score_bytes=" + "9" * 5000 + "}", "not JSON"),
        ("chunk-queries{max_score_bytes=" + "[" * 100_000 + "}", "not JSON"),
    ],
)
def test_bad_text_is_a_usage_error(text, why):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert why in str(caught.value)


@given(st.text(alphabet='sink-trapo{}=,[]"1e ', max_size=40))
@example("{")
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_text_raises_anything_else(text):
    try:
        passes = parse(f"sink-transposes{text}")
    except UsageError:
        return
    assert passes[0] == SinkTransposes(images=passes[0].images)


def test_a_name_that_is_nearly_right_gets_a_hint():
    with pytest.raises(UsageError) as caught:
        get_pass("fold-constant")
    assert "fold-constants" in (caught.value.hint or "")
    with pytest.raises(UsageError):
        build(SinkTransposes, {"nothing": 1})
