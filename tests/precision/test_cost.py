"""What targets say of precisions, and what it comes to for an op."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from edgegen.precision.cost import candidates, float_precision, refusal, stored_bytes, work_of
from edgegen.precision.plan import COMPRESSED, OpPlan
from edgegen.precision.sites import Site
from edgegen.targets import list_targets, load_target
from edgegen.targets.model import Delegate, DeniedOp


@pytest.mark.parametrize("name", list_targets())
def test_every_precision_that_a_runtime_lists_has_a_cost(name):
    target = load_target(name)
    for backend in target.backends:
        on = target.backend(backend)
        for precision in on.precisions:
            if precision != "fp32":
                assert on.cost("linear", precision) is not None, (backend, precision)


def test_the_float_comes_first_and_a_precision_must_be_everybody_s():
    target = load_target("linux-x86")
    one = candidates("linear", (), target, ["tflite"], "fp32")
    assert [c.precision for c in one] == ["fp32", "w8a8", "w8a8-dynamic", "w8"]
    both = candidates("conv", (), target, ["tflite", "onnx"], "fp32")
    assert [c.precision for c in both] == ["fp32", "w8a8"]
    assert both[1].time == pytest.approx({"tflite": 0.23, "onnx": 0.25})  # of large ops
    assert [c.precision for c in candidates("linear", (), target, ["tflite"], "fp32", ("w8",))] == ["fp32", "w8"]


def test_denials_are_of_places():
    on = load_target("linux-x86").backend("executorch")
    assert refusal("conv", "w8a8", ("strided",), on).startswith("`executorch`: ")
    assert refusal("conv", "w8a8", ("last",), on) is None
    assert refusal("conv", "w8a8-dynamic", (), on) is not None
    assert refusal("linear", "w8a8-dynamic", ("first",), on) is None
    assert "`executorch` executes fp32" in refusal("linear", "w4", (), on)


def test_a_phone_s_float_is_what_its_backends_prefer():
    phone = load_target("iphone15")
    assert float_precision(phone, ["coreml"]) == "fp16"
    assert float_precision(phone, ["coreml", "onnx"]) == "fp32"
    found = candidates("conv", (), phone, ["coreml"], "fp16")
    assert {c.precision: c.form for c in found} == {"fp16": "affine", "w8": "affine", "w6": "palette", "w4": "palette"}


@pytest.mark.parametrize("precision", COMPRESSED)
@pytest.mark.parametrize("group", [0, 4])
def test_bytes_are_those_of_the_encoded_weight(precision, group):
    import torch

    from edgegen.precision.encode import encode_weight

    facts = {"precision": precision, "op": "conv"}
    if precision.startswith("w8a8"):
        span = {"low": -1.0, "high": 1.0}
        facts |= {"input": span, "output": span}
    else:
        facts |= {"group": group, "form": "palette" if precision == "w6" else "affine"}
    op = OpPlan(**facts)
    for shape, axis in (((16, 8, 3, 3), 0), ((8, 16, 3, 3), 1)):
        encoded = encode_weight(torch.randn(shape), op, axis)
        assert stored_bytes(shape, shape[axis], op) == encoded.stored_bytes


def test_a_cost_twice_or_without_a_reference_is_refused():
    cost = {"op": "conv", "precision": "w8", "time": 1.0, "reference": "assumed: nobody measured it"}
    base = {"name": "x", "title": "x", "runtime": "onnx"}
    assert Delegate.model_validate({**base, "costs": [cost]}).costs[0].form == "affine"
    for wrong in ([cost, cost], [{**cost, "reference": "I think so"}], [{**cost, "time": 0.0}]):
        with pytest.raises(ValidationError):
            Delegate.model_validate({**base, "costs": wrong})
    denial = {"op": "aten.linear", "reason": "two words", "reference": "measured: so"}
    for wrong in ({"precisions": ["w8a8"]}, {"where": ["first"], "when": "first"}):
        with pytest.raises(ValidationError):
            DeniedOp.model_validate(denial | wrong)


def _runtime(*costs):
    delegate = Delegate(name="one", title="one", runtime="onnx", costs=costs)
    return replace(load_target("linux-x86").backend("onnx"), delegates=(delegate,))


def test_small_ops_take_what_is_said_of_their_values_and_calls():
    facts = {"op": "linear", "reference": "assumed: for this test"}
    plain = {**facts, "precision": "fp32", "time": 1.0, "values": 2.0, "call": 100.0}
    on = _runtime(plain, {**facts, "precision": "w8a8", "time": 0.25, "values": 10.0})
    assert on.time("linear", "fp32", 1000, 50) == pytest.approx(1.0 + 200 / 1000)
    assert on.time("linear", "w8a8", 1000, 50) == pytest.approx(0.25 + (500 + 100) / 1000)  # a call as in fp32
    assert on.time("linear", "w8a8", 10**9, 50) == pytest.approx(0.25, rel=1e-3)
    assert on.time("conv", "fp32", 1000, 50) == 1.0


def test_an_op_may_be_too_small_for_int8_to_pay():
    facts = {"op": "linear", "reference": "assumed: for this test"}
    on = _runtime(
        {**facts, "precision": "fp32", "time": 1.0, "values": 0.0, "call": 0.0},
        {**facts, "precision": "w8a8", "time": 0.25, "values": 0.0, "call": 3000.0},
    )
    assert on.time("linear", "w8a8", 2000, 0) > on.time("linear", "fp32", 2000, 0)
    assert on.time("linear", "w8a8", 8000, 0) < on.time("linear", "fp32", 8000, 0)


def test_work_is_read_off_the_weight():
    linear = Site("a", "linear", "a", "w", (64, 32), 10 * 64 * 32)
    assert work_of(linear) == (10 * 64 * 32, 10 * (64 + 32))
    conv = Site("a", "conv", "a", "w", (8, 4, 3, 3), 25 * 8 * 4 * 9)
    assert work_of(conv) == (25 * 8 * 4 * 9, 25 * (8 + 4))
    assert work_of(Site("a", "matmul", "a", None, (), 100)) == (100, 0)
