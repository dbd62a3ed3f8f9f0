"""Codes and scales: exact where they promise to be, close to the best where they cannot be."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegen.errors import EdgegenError, UsageError
from edgegen.precision.encode import activation_qparams, encode_weight, grid
from edgegen.precision.palette import SORTED_UP_TO, palettes
from edgegen.precision.plan import OpPlan, Range


def op(precision, **changes):
    return OpPlan(op="conv", precision=precision, **changes)


FORMS = {
    "w8": op("w8"),
    "w8 in groups": op("w8", group=4),
    "w4": op("w4"),
    "w4 in groups": op("w4", group=4),
    "8-bit palette": op("w8", form="palette"),
    "6-bit palette": op("w6", form="palette"),
    "4-bit palettes of 4 channels": op("w4", form="palette", group=4),
}


def sqnr(a, b):
    return 10 * math.log10(float(a.double().square().sum() / (a - b).double().square().sum()))


def weight(*shape, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made * torch.logspace(-3, 0, shape[0]).view(-1, *[1] * (len(shape) - 1))


def same(one, other):
    held = [(one.codes, other.codes), (one.scales, other.scales), (one.tables, other.tables)]
    return all(a is b is None or torch.equal(a, b) for a, b in held)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "axis"), [((12, 8), 0), ((12, 8, 3, 3), 0), ((8, 12, 2, 2), 1), ((12, 4, 3), 0)])
def test_what_was_decoded_is_encoded_to_the_same(form, shape, axis):
    one = encode_weight(weight(*shape), FORMS[form], axis)
    assert one.codes.shape == shape
    decoded = one.decode()
    assert decoded.shape == shape and decoded.dtype == torch.float32
    assert same(one, encode_weight(decoded, FORMS[form], axis))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(-60, 20), st.sampled_from(sorted(FORMS)))
def test_idempotence_holds_at_every_magnitude(seed, exponent, form):
    values = weight(8, 8, 2, seed=seed) * 2.0**exponent
    one = encode_weight(values, FORMS[form])
    assert same(one, encode_weight(one.decode(), FORMS[form]))


def test_int8_is_per_output_channel_symmetric_and_as_good_as_it_gets():
    values = weight(16, 32, 3, 3)
    one = encode_weight(values, op("w8"))
    assert one.scales.shape == (16,) and one.codes.abs().max() == 127
    assert torch.equal(one.codes.flatten(1).abs().amax(1), torch.full((16,), 127, dtype=torch.int8))
    assert ((values - one.decode()).abs().flatten(1).amax(1) <= 0.5008 * one.scales * 1.07).all()
    assert sqnr(values, one.decode()) > 40


def test_a_tool_that_takes_the_greatest_magnitude_over_127_finds_our_scales():
    one = encode_weight(10 * weight(16, 32), op("w8"))
    assert torch.equal(one.decode().abs().amax(1) / 127, one.scales)
    assert torch.equal(one.scales.half().float(), one.scales)  # eleven bits


def test_rounding_is_half_to_even():
    values = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert encode_weight(values, op("w8")).codes.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_a_transposed_convolution_has_its_scales_along_its_second_axis():
    values = weight(12, 6, 2, 2).movedim(0, 1).contiguous()
    one = encode_weight(values, op("w8"), axis=1)
    assert one.scales.shape == (12,)
    assert torch.equal(one.decode(), encode_weight(values.movedim(1, 0), op("w8")).decode().movedim(0, 1))


def test_channels_of_zeros_stay_zero_with_a_scale_like_the_others():
    values = weight(4, 8)
    values[1] = 0
    one = encode_weight(values, op("w8"))
    assert not one.decode()[1].any() and one.scales[1] == one.scales.max()
    nothing = encode_weight(torch.zeros(4, 8), op("w8"))
    assert not nothing.decode().any() and torch.isfinite(nothing.scales).all()


def test_groups_share_a_scale_along_the_input_channels():
    values = weight(4, 16, 3, 3)
    values[:, 8:] *= 30
    whole, grouped = encode_weight(values, op("w4")), encode_weight(values, op("w4", group=8))
    assert grouped.scales.shape == (4, 2) and grouped.codes.abs().max() == 7
    assert sqnr(values[:, :8], grouped.decode()[:, :8]) > 15 > sqnr(values[:, :8], whole.decode()[:, :8])


def test_four_bits_are_clipped_where_that_is_better():
    values = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    plain = (values / (values.abs().max() / 7)).round() * (values.abs().max() / 7)
    assert sqnr(values, encode_weight(values, op("w4")).decode()) > sqnr(values, plain) + 1.0


@pytest.mark.parametrize("bits", [4, 6])
def test_palettes_come_near_the_best_quantizer_of_a_normal_variable(bits):
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    found = sqnr(values, encode_weight(values, OpPlan(op="conv", precision=f"w{bits}", form="palette")).decode())
    assert found > {4: 20.22, 6: 31.89}[bits] - 0.1  # Max (1960), table I, and Gish and Pierce's limit above


def test_a_small_palette_is_within_a_percent_of_the_best_there_is():
    values = torch.randn(14, generator=torch.Generator().manual_seed(3)).sort().values
    best = min(
        sum(float((part - part.mean()).square().sum()) for part in values.tensor_split(list(cuts)))
        for cuts in itertools.combinations(range(1, 14), 3)
    )
    tables, codes = palettes(values[None], 4)
    error = float((values - tables[0][codes[0].long()]).square().sum())
    assert error == pytest.approx(best, rel=0.01)


def test_counted_and_sorted_palettes_agree():
    values = torch.randn(SORTED_UP_TO + 2, generator=torch.Generator().manual_seed(0))
    values[0] = 40.0  # an outlier must not coarsen what is counted
    tables, codes = palettes(values[None], 64)
    short, places = palettes(values[None, :SORTED_UP_TO], 64)
    counted, ordered = tables[0][codes[0].long()], short[0][places[0].long()]
    assert abs(sqnr(values[:SORTED_UP_TO], counted[:SORTED_UP_TO]) - sqnr(values[:SORTED_UP_TO], ordered)) < 0.1
    assert torch.equal(palettes(tables[0][codes[0].long()][None], 64)[1], codes)


def test_importance_moves_a_palette_towards_what_counts():
    values, importance = torch.randn(8, 64), torch.ones(1, 64)
    importance[:, 0] = 1e4
    plan = op("w4", form="palette")
    plain, led = (encode_weight(values, plan, importance=one).decode() for one in (None, importance))
    assert sqnr(values[:, 0], led[:, 0]) > sqnr(values[:, 0], plain[:, 0]) + 6
    assert sqnr(values, led) < sqnr(values, plain)


def test_a_row_of_few_values_keeps_them():
    values = torch.tensor([[0.5, -1.0, 0.5, 3.0]])
    tables, codes = palettes(values, 16)
    assert tables[0][:3].tolist() == [-1.0, 0.5, 3.0] and (tables[0][3:] == 3.0).all()
    assert torch.equal(tables[0][codes[0].long()], values[0])


def test_float16_weights_decode_to_float16_values_of_the_palette():
    values = weight(8, 64).half()
    one = encode_weight(values, op("w4", form="palette"))
    assert torch.equal(one.tables.half().float(), one.tables)


def test_bytes_are_those_of_packed_codes():
    values = weight(16, 32)
    assert encode_weight(values, op("w8")).stored_bytes == 16 * 32 + 2 * 16
    assert encode_weight(values, op("w4", group=8)).stored_bytes == 16 * 32 // 2 + 2 * 16 * 4
    assert encode_weight(values, op("w6", form="palette")).stored_bytes == 16 * 32 * 6 // 8 + 2 * 64


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad):
    values = weight(4, 4)
    values[2, 1] = bad
    with pytest.raises(EdgegenError, match="weight `to_q` holds NaN or infinity"):
        encode_weight(values, op("w8"), name="to_q")


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match="`to_q` has 6 input channels, which groups of 4 do not divide"):
        encode_weight(weight(4, 6), op("w4", group=4), name="to_q")
    with pytest.raises(UsageError, match="6 output channels"):
        encode_weight(weight(6, 4), op("w4", form="palette", group=4))
    with pytest.raises(UsageError, match="nothing to encode"):
        encode_weight(weight(6, 4), op("fp16"))


@given(st.floats(-1e20, 1e20), st.floats(-1e20, 1e20))
def test_activation_codes_cover_the_range_and_hold_zero(a, b):
    low, high = sorted((a, b))
    scale, zero = found = activation_qparams(Range(low=low, high=high))
    covered = grid(found)
    assert -128 <= zero <= 127 and scale > 0
    assert covered.low <= 0 <= covered.high
    if max(-low, high) > 1e-20:
        assert covered.low <= low + 0.51 * scale and covered.high >= high - 0.51 * scale
        assert 255 * scale <= (max(high, 0) - min(low, 0)) * 1.001
    assert activation_qparams(covered) == found  # what is told to a tool gives the same codes


def test_ranges_that_end_at_zero_use_all_codes():
    assert activation_qparams(Range(low=0, high=255)) == (1.0, -128)
    assert activation_qparams(Range(low=-255, high=0)) == (1.0, 127)
    assert activation_qparams(Range(low=0, high=0)) == (1.0, 0)
    with pytest.raises(EdgegenError, match="not finite"):
        activation_qparams(Range(low=0, high=math.inf))
