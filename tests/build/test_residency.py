"""What fits is left alone; what does not is loaded in turn, cut into parts, or refused with its figures."""

from __future__ import annotations

import pytest

from edgegen.build.residency import Ceiling, Need, TooLarge, share_memory

MIB = 2**20
NEEDS = {
    "text_encoder": Need(100 * MIB, 10 * MIB),
    "denoiser": Need(300 * MIB, 50 * MIB),
    "decoder": Need(10 * MIB, 120 * MIB),
}


def plan(ceiling_mib: float, needs=NEEDS, **options):
    return share_memory(needs, Ceiling(bytes=int(ceiling_mib * MIB), source="assumed: a test"), **options)


def test_what_fits_is_loaded_together():
    made = plan(1000)
    assert made.load == "together"
    assert made.peak_bytes == (100 + 300 + 10 + 120) * MIB
    assert {one.parts for one in made.components.values()} == {1}


def test_what_does_not_fit_together_is_loaded_in_turn():
    made = plan(600)
    assert made.load == "sequential"
    assert made.peak_bytes == 350 * MIB
    assert "each is loaded, run and let go" in " ".join(made.why)


@pytest.mark.parametrize("ceiling, parts", [(400, 2), (250, 2), (200, 3)])
def test_a_component_that_is_too_large_is_cut(ceiling, parts):
    made = plan(ceiling)
    assert made.components["denoiser"].parts == parts
    assert made.peak_bytes <= 0.8 * ceiling * MIB


def test_values_that_do_not_fit_are_refused_with_what_they_need():
    with pytest.raises(TooLarge, match="`decoder` needs 120 MiB for its values") as caught:
        plan(140)
    assert caught.value.component == "decoder"
    assert caught.value.spare == int(0.8 * 140 * MIB) - 10 * MIB
    assert "--max-memory" in str(caught.value.hint)


def test_a_file_that_its_format_cannot_hold_is_cut_though_memory_would_do():
    large = {**NEEDS, "denoiser": Need(5000 * MIB, 50 * MIB, (2048 * MIB, "FlatBuffers' offsets"))}
    made = plan(10000, large)
    assert made.load == "together"
    assert made.components["denoiser"].parts == 4
    assert any("FlatBuffers" in line for line in made.why)


def test_a_package_of_functions_is_not_cut():
    with pytest.raises(TooLarge, match="a package of functions holds it whole") as caught:
        plan(400, splittable=False)
    assert caught.value.hint == "build without `--one-package`"
