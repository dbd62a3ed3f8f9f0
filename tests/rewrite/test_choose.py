"""`--passes`: what the user changes about the presets."""

import pytest

from edgegen.errors import UsageError
from edgegen.rewrite.choose import Edits, canonical_preset, shape_preset
from edgegen.rewrite.fold_constants import FoldConstants
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.presets import canonical
from edgegen.rewrite.registry import parse
from edgegen.rewrite.remove_identities import RemoveIdentities
from edgegen.rewrite.specialise_timestep import SpecialiseTimestep

PRESET = canonical.passes((999.0, 499.0))


def names(pipeline):
    return [one.name for one in pipeline.passes]


def test_without_edits_the_presets_are_what_runs():
    assert Edits(None).canonical(PRESET).passes == PRESET
    assert Edits(None).shape((), PRESET).passes == ()


def test_a_pass_is_left_out():
    assert "fold-constants" not in names(Edits("-fold-constants").canonical(PRESET))


def test_a_pass_with_other_options_takes_its_place():
    edited = Edits("specialise-timestep{values=[1.0]}").canonical(PRESET)
    assert SpecialiseTimestep((1.0,)) in edited.passes
    assert names(edited) == [one.name for one in PRESET]


def test_a_pass_that_no_preset_has_joins_the_end_of_the_targets():
    edits = Edits("fold-constants")
    assert edits.shape((), ()).passes == (FoldConstants(),)
    assert edits.shape((), PRESET).passes == ()


def test_none_clears_and_what_follows_counts():
    edits = Edits("none, remove-identities")
    assert edits.canonical(PRESET).passes == ()
    assert edits.shape(PRESET, PRESET).passes == (RemoveIdentities(),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fold-constant", "there is no pass `fold-constant`"),
        ("-fold-constant", "there is no pass `fold-constant`"),
        ("fold-constants,,remove-identities", "empty name"),
        ("specialise-timestep", "needs its option `values`"),
        ("specialise-timestep{values=[1}", "is not JSON"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(text, said):
    with pytest.raises(UsageError, match=said):
        Edits(text)


@pytest.mark.parametrize("backend", ["coreml", "coreai", "executorch", "tflite", "onnx"])
def test_every_preset_is_a_legal_pipeline_and_reads_back(backend):
    pipeline = Pipeline((*canonical_preset("denoiser", (999.0,)), *shape_preset(backend)))
    assert parse(str(pipeline)) == pipeline.passes


def test_only_the_denoiser_is_called_with_a_time():
    assert "specialise-timestep" in [one.name for one in canonical_preset("denoiser", (999.0,))]
    assert "specialise-timestep" not in [one.name for one in canonical_preset("decoder", (999.0,))]
