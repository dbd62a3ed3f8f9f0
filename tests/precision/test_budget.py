"""The plan that is taken in the end: held against measurements that the estimates did not foresee."""

import math
import re

import pytest

from edgegen.precision.budget import Budget, Measured, costs_like, psnr, within
from edgegen.precision.choose import InfeasibleError, Item, Option, Problem, choose
from edgegen.precision.refusal import refused
from edgegen.precision.settle import MissedError, settle


def whole(backends=("onnx",)):
    """Twelve ops: each saves the same, and spoils twice as much as the one before."""
    items = []
    slow, fast = ({f"latency {name}": each for name in backends} for each in (1 / 12, 0.3 / 12))
    for index in range(12):
        loss = 1e-5 * 2**index
        options = (
            Option("fp32", {**slow, "bytes": 4.0}, {"picture": 0.0, "conditioning": 0.0}),
            Option("w8a8", {**fast, "bytes": 1.0}, {"picture": loss, "conditioning": loss}),
        )
        items.append(Item("net", f"op{index}", options))
    return Problem(tuple(items), {"bytes": 1.0})


def measuring(factor, conditioning=0.0, alignment=None):
    """Pictures that are `factor` times worse than estimated."""
    seen = []

    def measure(choice):
        seen.append(choice)
        aligned = None if alignment is None else alignment(choice.totals["picture"])
        return Measured(psnr(choice.totals["picture"] * factor), conditioning, aligned)

    measure.seen = seen
    return measure


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 3.0, 20.0])
def test_the_floor_is_kept_by_what_is_measured_and_not_by_much_more(factor):
    budget = Budget(psnr=30.0, conditioning=0.05)
    measure = measuring(factor)
    choice, found = settle(within(whole(), budget, ["onnx"]), budget, measure)
    assert found.psnr >= 30.0
    best = choose(within(whole(), Budget(psnr=30.0 + 10 * math.log10(factor)), ["onnx"]))
    compressed = [sum(one.precision == "w8a8" for one in each.options) for each in (choice, best)]
    assert compressed[0] >= compressed[1] - 1
    assert len(measure.seen) <= 8


def test_alignment_alone_draws_the_plan_in_until_it_holds():
    budget = Budget(alignment=0.9, conditioning=0.05)
    measure = measuring(1.0, alignment=lambda loss: 0.95 if loss < 5e-4 else 0.8)
    choice, found = settle(within(whole(), budget, ["onnx"]), budget, measure)
    assert found.alignment == 0.95 and choice.totals["picture"] < 5e-4
    assert any(one.precision == "w8a8" for one in choice.options)


def test_how_prompts_are_heard_is_kept_too():
    budget = Budget(psnr=10.0, conditioning=0.02)

    def measure(choice):
        return Measured(psnr(choice.totals["picture"]), math.sqrt(choice.totals["conditioning"]) * 2)

    choice, found = settle(within(whole(), budget, ["onnx"]), budget, measure)
    assert found.conditioning <= 0.02 and any(one.precision == "w8a8" for one in choice.options)


def test_what_is_never_measured_to_hold_is_an_error_with_the_nearest():
    budget = Budget(psnr=30.0, conditioning=0.05)
    asked = within(whole(), budget, ["onnx"])

    def broken(choice):
        return Measured(21.5, 0.3)

    with pytest.raises(MissedError) as caught:
        settle(asked, budget, broken)
    said = refused(caught.value, asked, budget, broken)
    assert said.exit_code == 3
    assert "the nearest is measured at 21.5 dB, conditioning changed by 30.0%" in said.message
    assert "conditioning within 0.05 binds: 30.00% are sure" in said.message
    assert "`--min-psnr 21.5 --max-conditioning 0.3`" in said.hint


def test_other_prompts_decide_and_not_the_measured_ones():
    """What is measured would do everywhere; the bound of unseen prompts is four times as far."""
    budget = Budget(psnr=10.0, conditioning=0.02)

    def measure(choice):
        worst = math.sqrt(choice.totals["conditioning"]) / 4
        return Measured(40.0, worst, conditioning_most=4 * worst, pairs=9)

    _, found = settle(within(whole(), budget, ["onnx"]), budget, measure)
    assert 0.01 < found.conditioning_most <= 0.02 and found.conditioning <= 0.005
    assert re.search(r"conditioning changed by 0\.[0-9]% \(<= [12]\.[0-9]%\)", found.said())


def test_room_that_is_left_is_used():
    """A first guess that hears ten times better than it has to is not the last."""
    budget = Budget(psnr=10.0, conditioning=0.02)

    def measure(choice):
        return Measured(psnr(choice.totals["picture"]), math.sqrt(choice.totals["conditioning"]) / 10)

    _, found = settle(within(whole(), budget, ["onnx"]), budget, measure)
    assert 0.01 < found.conditioning <= 0.02


def test_a_cap_alone_is_measured_once():
    budget = Budget(size=30, aim="loss")
    measure = measuring(1.0)
    choice, _ = settle(within(whole(), budget, ["onnx"]), budget, measure)
    assert choice.totals["bytes"] <= 30 and len(measure.seen) == 1
    assert [one.precision for one in choice.options] == ["w8a8"] * 7 + ["fp32"] * 5


def test_an_infeasible_budget_in_words():
    budget = Budget(latency={"onnx": 0.5}, psnr=34.0)
    asked = within(whole(), budget, ["onnx"])
    with pytest.raises(InfeasibleError) as caught:
        choose(asked)
    measure = measuring(2.0)
    said = refused(caught.value, asked, budget, measure)
    assert "latency onnx <= 0.5000 of fp32 binds: with the others kept, the best is latency onnx 0.7083" in said.message
    assert "PSNR >= 34.00 dB binds: with the others kept, the best is PSNR 2" in said.message
    share = float(re.search(r"`--max-latency ([\d.]+)`", said.hint)[1])
    assert share > 0.7083  # pictures are worse than estimated, and the hint is what was measured
    typed = Budget(latency={"onnx": share}, psnr=34.0)
    assert settle(within(whole(), typed, ["onnx"]), typed, measure)[1].psnr >= 34.0
    softer = Budget(latency={"onnx": 0.5}, psnr=float(re.search(r"`--min-psnr ([\d.]+)`", said.hint)[1]))
    assert settle(within(whole(), softer, ["onnx"]), softer, measure)[1].psnr >= softer.psnr


def test_no_loss_at_all_has_decibels_that_json_can_say():
    assert psnr(0.0) == 200.0 and psnr(1e-3) == pytest.approx(30.0)


def test_where_prompts_are_noise_of_all_ops_a_plan_between_the_corners_is_found():
    """Six ops spoil pictures, six what prompts change; measured, both spoil how prompts are heard."""
    items = []
    for index in range(12):
        size = 1e-5 * 1.7 ** (index % 6)
        losses = {"picture": size, "conditioning": size * 0.05} if index < 6 else {"picture": 0.0, "conditioning": size}
        options = (
            Option("fp32", {"latency onnx": 1 / 12, "bytes": 4.0}, {"picture": 0.0, "conditioning": 0.0}),
            Option("w8a8", {"latency onnx": 0.3 / 12, "bytes": 1.0}, losses),
        )
        items.append(Item("net", f"op{index}", options))
    budget = Budget(psnr=28.0, conditioning=0.02)

    seen = []

    def measure(choice):
        heard = choice.totals["conditioning"] + choice.totals["picture"]
        seen.append((choice, Measured(psnr(choice.totals["picture"]), math.sqrt(heard))))
        return seen[-1][1]

    choice, found = settle(within(Problem(tuple(items)), budget, ["onnx"]), budget, measure)
    assert found.keeps(budget)
    kept = [one.totals["latency onnx"] for one, measured in seen if measured.keeps(budget)]
    assert choice.totals["latency onnx"] == pytest.approx(min(kept))
    assert choice.totals["latency onnx"] < max(kept)


def test_a_latency_asked_of_two_backends_binds_as_one():
    """Neither cap alone would let the other be kept: what binds is the option that asked for both."""
    budget = Budget(latency={"onnx": 0.5, "tflite": 0.5}, psnr=34.0)
    asked = within(whole(("onnx", "tflite")), budget, ["onnx", "tflite"])
    with pytest.raises(InfeasibleError) as caught:
        choose(asked)
    assert None not in caught.value.best.values()
    assert all(caught.value.best[f"latency {name}"] > 0.5 for name in ("onnx", "tflite"))


def test_what_precisions_cost_is_a_budget_that_they_keep_to_and_no_less():
    problem = whole(("onnx", "tflite"))
    named = {"net": {f"op{index}": "w8a8" for index in (0, 11)} | {"op5": "w4", "elsewhere": "w8a8"}, "other": {}}
    latency, size = costs_like(problem, named, ("onnx", "tflite"))
    assert size == 1 + 10 * 4 + 2 and latency == pytest.approx({"onnx": 10.6 / 12, "tflite": 10.6 / 12})
    chosen = choose(within(problem, Budget(latency=latency, size=size, aim="loss"), ["onnx", "tflite"]))
    compressed = [item.key for item, one in zip(problem.items, chosen.options, strict=True) if one.precision == "w8a8"]
    assert compressed == ["op0", "op1"], "as cheap as what was named, and loses least"
