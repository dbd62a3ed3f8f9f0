import math
from types import SimpleNamespace

import numpy as np
import pytest
from torch_executable import Prepared, TorchExecutable, torch_executables

from edgegen.bundle.manifest import PlanBound
from edgegen.errors import GateError
from edgegen.lower.backend import Delegation
from edgegen.verify.gates import check, default_gates, require, required_of_float, required_of_plan
from edgegen.verify.outcome import ComponentParity, Outcome, ParityReport, SensitivityStep, Unavailable
from edgegen.verify.parity import compiled_run, load_executables, verify
from edgegen.verify.worker import PREDICTED, predicted_db


def judge(reference, executables, precision="fp32", **options):
    return verify(reference, executables, precision, backend="torch", **options)


def gates_failed(report):
    return {gate.gate for gate in report.failed}


@pytest.fixture
def perfect(shapes):
    return torch_executables(shapes)


def test_the_reference_passes_against_itself(shapes_reference, perfect):
    drawn = []
    report = judge(shapes_reference, perfect, on_picture=lambda one, picture: drawn.append((one, picture)))
    assert report.status == "passed" and report.passed and not report.failed
    assert {part.outcome for part in report.components} == {Outcome.SUCCESS}
    assert report.worst_sqnr_db > 100 and report.worst_psnr_db > 100
    assert len(report.pictures) == len(drawn) == len(shapes_reference.trajectories) == 3
    assert len(report.sensitivity) == sum(len(pair.a.steps) for pair in shapes_reference.pairs) == 4
    worst = report.worst_sensitivity
    assert worst is not None and abs(worst.ratio - 1) < 1e-3 and worst.cosine > 0.999
    for one, picture in drawn:
        assert picture.dtype == np.uint8 and picture.shape == (64, 64, 3)
        assert np.abs(picture.astype(int) - one.picture.astype(int)).max() <= 1


def test_the_report_survives_json(shapes_reference, perfect):
    report = judge(shapes_reference, perfect)
    again = ParityReport.model_validate_json(report.model_dump_json())
    assert again == report
    assert any(output.sqnr_db == math.inf for part in again.components for output in part.outputs)


def test_tiny_noise_passes(shapes, shapes_reference, perfect):
    rng = np.random.default_rng(3)

    def noisy(out):
        return {k: v * (1 + 1e-4 * rng.standard_normal(v.shape)).astype(np.float32) for k, v in out.items()}

    executables = {name: TorchExecutable(part, noisy) for name, part in shapes.components.items()}
    report = judge(shapes_reference, executables)
    assert report.status == "passed", report.failed
    assert 70 < report.worst_sqnr_db < 90


def test_noise_beyond_the_fp32_gate_fails_it_and_meets_the_fp16_gate(shapes, shapes_reference, perfect):
    rng = np.random.default_rng(3)
    noisy = lambda out: {k: v * (1 + 3e-3 * rng.standard_normal(v.shape)).astype(np.float32) for k, v in out.items()}  # noqa: E731
    executables = {**perfect, "decoder": TorchExecutable(shapes.components["decoder"], noisy)}
    assert gates_failed(judge(shapes_reference, executables)) >= {"sqnr"}
    assert judge(shapes_reference, executables, "fp16").status == "passed"


def empty_context(shapes_reference, executables, student):
    ids = student.tokenize([""]).numpy()
    context = executables["text_encoder"]({"input_ids": ids})["context"]
    return lambda inputs: {**inputs, "context": context}


def test_an_artifact_that_ignores_the_prompt_is_caught_by_sensitivity(shapes, shapes_reference, perfect):
    """It draws the same fine picture for every prompt: the ratio is 0 at every step."""
    ignore = Prepared(perfect["denoiser"], empty_context(shapes_reference, perfect, shapes))
    report = judge(shapes_reference, {**perfect, "denoiser": ignore})
    assert "sensitivity" in gates_failed(report)
    assert all(step.ratio == 0.0 for step in report.sensitivity)


def test_an_artifact_with_one_fixed_context_fails_though_that_prompt_is_perfect(shapes, shapes_reference, perfect):
    """A single prompt, measured by SQNR and PSNR alone, would call it perfect."""
    first = shapes_reference.trajectories[0]
    frozen = Prepared(perfect["denoiser"], lambda inputs: {**inputs, "context": first.conditioning["context"]})
    single = [p for p in judge(shapes_reference, {**perfect, "denoiser": frozen}).pictures if p.prompt == first.prompt]
    assert single and all(picture.psnr_db > 100 for picture in single)
    report = judge(shapes_reference, {**perfect, "denoiser": frozen})
    assert "sensitivity" in gates_failed(report)


def test_a_text_encoder_that_ignores_the_prompt_is_caught(shapes, shapes_reference, perfect):
    ids = shapes_reference.trajectories[0].given
    frozen = Prepared(perfect["text_encoder"], lambda inputs: {"input_ids": ids})
    report = judge(shapes_reference, {**perfect, "text_encoder": frozen})
    assert gates_failed(report) >= {"sqnr", "sensitivity"}
    assert report.components[0].outcome is Outcome.MISMATCH


def test_a_context_scaled_by_nine_tenths_is_caught(shapes_reference, perfect):
    weaker = Prepared(perfect["denoiser"], lambda inputs: {**inputs, "context": inputs["context"] * np.float32(0.9)})
    report = judge(shapes_reference, {**perfect, "denoiser": weaker})
    assert "sensitivity" in gates_failed(report)
    worst = report.worst_sensitivity
    assert worst is not None and max(abs(worst.ratio - 1), 1 - worst.cosine) > 0.02


def test_a_response_to_the_prompt_damped_by_five_percent_is_caught_where_sqnr_gates_are_lax(
    shapes, shapes_reference, perfect
):
    """out = empty + 0.95 (out - empty): with an SQNR gate too low to see it, the ratio is 0.95 and fails alone."""
    context = empty_context(shapes_reference, perfect, shapes)
    honest = perfect["denoiser"]

    class Damped:
        def __call__(self, inputs):
            base, out = honest(context(dict(inputs)))["prediction"], honest(inputs)["prediction"]
            return {"prediction": base + np.float32(0.95) * (out - base)}

        def close(self):
            honest.close()

    gates = default_gates().model_copy(update={"sqnr_db": {"fp32": 0.0}, "picture_psnr_db": {"fp32": 0.0}})
    report = judge(shapes_reference, {**perfect, "denoiser": Damped()}, gates=gates)
    assert gates_failed(report) == {"sensitivity"}
    assert all(step.ratio == pytest.approx(0.95, abs=1e-3) for step in report.sensitivity)


def test_prompts_swapped_inside_the_denoiser_are_caught_by_the_direction(shapes, shapes_reference, perfect):
    """The ratio of the stds is exactly 1: only the sign of the difference tells."""
    first, pair = shapes_reference.trajectories[0], shapes_reference.pairs[0]
    other = next(t for t in shapes_reference.trajectories if t.prompt == pair.prompt_b)

    def swap(inputs):
        is_a = np.allclose(inputs["context"], first.conditioning["context"], atol=1e-4)
        return {**inputs, "context": other.conditioning["context"] if is_a else first.conditioning["context"]}

    report = judge(shapes_reference, {**perfect, "denoiser": Prepared(perfect["denoiser"], swap)})
    steps = [s for s in report.sensitivity if (s.prompt_a, s.prompt_b) == (first.prompt, pair.prompt_b)]
    assert steps and all(s.ratio == pytest.approx(1.0, abs=1e-3) for s in steps)
    assert all(s.cosine == pytest.approx(-1.0, abs=1e-3) for s in steps)
    only_sensitivity = check(default_gates(), "fp32", [], [], steps)
    assert {gate.gate for gate in only_sensitivity} == {"sensitivity"} and len(only_sensitivity) == len(steps)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5])
@pytest.mark.parametrize("component", ["text_encoder", "denoiser", "decoder"])
def test_nan_infinity_and_constants_never_pass(shapes, shapes_reference, perfect, component, value):
    filled = TorchExecutable(
        shapes.components[component], lambda out: {k: np.full_like(v, value) for k, v in out.items()}
    )
    report = judge(shapes_reference, {**perfect, component: filled})
    assert report.status == "failed"
    assert next(part for part in report.components if part.component == component).outcome is Outcome.MISMATCH
    if component != "decoder":
        assert "sensitivity" in gates_failed(report)
    assert ParityReport.model_validate_json(report.model_dump_json()).failed == report.failed
    with pytest.raises(GateError):
        require([report])


def test_one_nan_pixel_for_one_prompt_fails(shapes, shapes_reference, perfect):
    last = shapes_reference.trajectories[-2].image

    def spoil(out):
        if np.allclose(out["image"], last, atol=1e-3):
            out["image"][0, 0, 0, 0] = np.nan
        return out

    report = judge(shapes_reference, {**perfect, "decoder": TorchExecutable(shapes.components["decoder"], spoil)})
    assert gates_failed(report) == {"sqnr", "picture_psnr"}


def test_wrong_shapes_names_and_dtypes_are_mismatches_with_a_reason(shapes, shapes_reference, perfect):
    decoder = shapes.components["decoder"]
    for tamper, words in (
        (lambda out: {"picture": out["image"]}, "output `image` is missing, found `picture`"),
        (lambda out: {"image": out["image"][0]}, "its signature says float32[1, 3, 64, 64]"),
        (lambda out: {"image": out["image"].astype(np.float16)}, "output `image` is float16"),
    ):
        report = judge(shapes_reference, {**perfect, "decoder": TorchExecutable(decoder, tamper)})
        part = report.components[-1]
        assert part.outcome is Outcome.MISMATCH and words in part.reason
        assert report.status == "failed" and not report.pictures


def test_an_artifact_that_raises_is_a_run_fail(shapes, shapes_reference, perfect):
    def explode(out):
        raise RuntimeError("kernel\nexploded")

    report = judge(shapes_reference, {**perfect, "denoiser": TorchExecutable(shapes.components["denoiser"], explode)})
    part = report.components[1]
    assert part.outcome is Outcome.RUN_FAIL and "RuntimeError: kernel exploded" in part.reason
    assert "execution" in gates_failed(report)


def test_an_artifact_that_fails_only_in_its_own_loop_still_fails(shapes, shapes_reference, perfect):
    calls = len(shapes_reference.samples["denoiser"])
    seen = []

    def late(out):
        seen.append(1)
        if len(seen) > calls:
            raise RuntimeError("out of arena")
        return out

    report = judge(shapes_reference, {**perfect, "denoiser": TorchExecutable(shapes.components["denoiser"], late)})
    assert report.components[1].outcome is Outcome.RUN_FAIL
    assert report.status == "failed"


def test_an_executable_that_writes_into_its_inputs_does_not_corrupt_the_reference(shapes, shapes_reference, perfect):
    class Scribbler:
        def __call__(self, inputs):
            out = perfect["decoder"](inputs)
            inputs["latent"][:] = 7.0
            return out

        def close(self):
            pass

    before = shapes_reference.samples["decoder"][0].inputs["latent"].copy()
    assert judge(shapes_reference, {**perfect, "decoder": Scribbler()}).status == "passed"
    assert np.array_equal(before, shapes_reference.samples["decoder"][0].inputs["latent"])


def test_not_executed_is_neither_pass_nor_failure(shapes_reference, perfect):
    absent = Unavailable(outcome=Outcome.NOT_EXECUTED, reason="Core ML runs on macOS only")
    report = judge(shapes_reference, dict.fromkeys(perfect, absent), "fp16")
    assert report.status == "not_executed" and not report.passed and not report.failed
    assert {part.outcome for part in report.components} == {Outcome.NOT_EXECUTED}
    assert report.worst_sqnr_db is None and report.worst_psnr_db is None
    require([report])


def test_one_component_not_executed_keeps_the_whole_from_passing(shapes_reference, perfect):
    absent = Unavailable(outcome=Outcome.NOT_EXECUTED, reason="no such delegate here")
    report = judge(shapes_reference, {**perfect, "decoder": absent})
    assert report.status == "not_executed"
    assert "`decoder`" in report.notes[0]


def test_a_component_without_an_artifact_fails(shapes_reference, perfect):
    del perfect["decoder"]
    report = judge(shapes_reference, perfect)
    assert report.components[-1].outcome is Outcome.LOWER_FAIL and report.status == "failed"


def test_full_delegation_is_required_only_when_asked_and_unknown_is_not_full(shapes_reference, perfect):
    whole = Delegation(delegate="d", known=True, delegated_ops=9, total_ops=9, pieces=1)
    broken = Delegation(delegate="d", known=True, delegated_ops=7, total_ops=9, pieces=2, undelegated={"aten.split": 2})
    unknown = Delegation(delegate="d", known=False, note="decided on the device")
    delegations = {"text_encoder": whole, "denoiser": broken, "decoder": unknown}
    assert judge(shapes_reference, perfect, delegations=delegations).status == "passed"
    report = judge(
        shapes_reference, perfect, delegations=delegations, gates=default_gates(require_full_delegation=True)
    )
    assert [(gate.gate, gate.subject) for gate in report.failed] == [
        ("delegation", "denoiser"),
        ("delegation", "decoder"),
    ]
    outcomes = [part.outcome for part in report.components]
    assert outcomes == [Outcome.SUCCESS, Outcome.UNDELEGATED, Outcome.UNDELEGATED]
    with pytest.raises(GateError) as caught:
        require([report])
    assert caught.value.exit_code == 3
    assert "7 of 9 ops in 2 pieces; outside: aten.split x2" in caught.value.message
    assert "decided on the device" in caught.value.message


def test_nothing_delegated_is_said_even_when_it_is_not_required(shapes_reference, perfect):
    none = Delegation(delegate="d", known=True, delegated_ops=0, total_ops=9, pieces=0, undelegated={"aten.conv2d": 9})
    report = judge(shapes_reference, perfect, delegations={"decoder": none})
    assert report.components[-1].outcome is Outcome.UNDELEGATED and report.status == "passed"


def test_the_table_names_backend_gate_place_numbers_and_blame(shapes_reference, perfect):
    frozen = Prepared(perfect["decoder"], lambda inputs: {"latent": inputs["latent"] * np.float32(0.5)})
    report = judge(shapes_reference, {**perfect, "decoder": frozen}, blame=lambda name, gate: f"{name} below {gate:g}")
    with pytest.raises(GateError) as caught:
        require([report])
    text = caught.value.message
    assert "backend" in text and "torch" in text and ">= 60 dB" in text and ">= 45 dB" in text
    assert "torch: decoder below 60" in text


def test_degenerate_sensitivity_is_reported_and_the_artifact_must_ignore_the_prompt_too():
    def step(compiled):
        return SensitivityStep(
            prompt_a="a", prompt_b="b", step=1, steps=1, reference_std=0.0, compiled_std=compiled, output_std=1.0,
            ratio=None, cosine=None, degenerate=True,
        )  # fmt: skip

    assert not check(default_gates(), "fp32", [], [], [step(1e-5)])
    failed = check(default_gates(), "fp32", [], [], [step(0.1), step(math.nan)])
    assert len(failed) == 2
    assert "ignores the prompt" in failed[0].measured


def test_a_student_that_ignores_the_prompt_is_said_so(shapes, shapes_reference, perfect):
    import dataclasses

    deaf = dataclasses.replace(
        shapes_reference,
        pairs=tuple(
            dataclasses.replace(p, predictions_b=tuple(s.prediction for s in p.a.steps)) for p in shapes_reference.pairs
        ),
    )
    frozen = Prepared(perfect["denoiser"], empty_context(shapes_reference, perfect, shapes))
    report = judge(deaf, {**perfect, "denoiser": frozen})
    assert any("itself ignores the prompt" in note for note in report.notes)
    assert report.worst_sensitivity is None


def test_compiled_run_equals_the_reference_trajectory(shapes_reference, perfect):
    one = shapes_reference.trajectories[0]
    run = compiled_run(shapes_reference, one, perfect)
    for step, latent in zip(one.steps, run.latents, strict=True):
        np.testing.assert_allclose(latent, step.latent_out, rtol=0, atol=1e-5)
    np.testing.assert_allclose(run.image, one.image, rtol=0, atol=1e-4)


def test_load_executables_types_what_goes_wrong(tmp_path, shapes_reference):
    def load(path, inputs, outputs):
        raise ValueError(f"cannot parse {path.name}")

    here = SimpleNamespace(not_executed_here=lambda: None, load=load)
    found = load_executables(here, {"decoder": tmp_path / "decoder.bin"}, shapes_reference.signatures)
    assert found["decoder"] == Unavailable(outcome=Outcome.LOAD_FAIL, reason="ValueError: cannot parse decoder.bin")
    elsewhere = SimpleNamespace(not_executed_here=lambda: "macOS only", load=load)
    found = load_executables(elsewhere, {"decoder": tmp_path / "decoder.bin"}, shapes_reference.signatures)
    assert found["decoder"].outcome is Outcome.NOT_EXECUTED


@pytest.mark.parametrize(("measured", "failed"), [(60.0, False), (54.1, False), (53.9, True), (-math.inf, True)])
def test_float16_is_held_to_what_its_arithmetic_predicts(measured, failed):
    """Far above the gate of 40 dB, and yet a converter that loses more than float16 explains has lost it elsewhere."""
    part = ComponentParity(component="decoder", outcome=Outcome.SUCCESS, sqnr_db=measured, predicted_db=60.0)
    gates = [gate for gate in check(default_gates(), "fp16", [part]) if gate.gate == "float16"]
    assert bool(gates) == failed
    if failed:
        assert gates[0].subject == "decoder" and "float16 predicts 60.0" in gates[0].required
    unknown = part.model_copy(update={"predicted_db": None})
    assert not [gate for gate in check(default_gates(), "fp16", [unknown]) if gate.gate == "float16"]


def test_a_plan_in_float16_loses_what_both_lose():
    """Noises add as powers; float32 adds nothing, and a plan that loses little leaves float16's own loss."""
    bound = PlanBound(stability_db=100.0, float_db=60.0)
    assert required_of_float(bound) == pytest.approx(59.0)
    assert required_of_float(bound.model_copy(update={"half_db": 60.0})) == pytest.approx(55.99, abs=0.01)
    assert required_of_float(bound.model_copy(update={"half_db": 90.0})) == pytest.approx(59.0, abs=0.01)
    assert required_of_float(PlanBound(stability_db=1.0, float_db=200.0, half_db=62.0)) == pytest.approx(61.0)


def test_a_plan_is_held_to_what_it_repeats_of_itself():
    bound = PlanBound(stability_db=37.0, float_db=28.0)
    assert required_of_plan(bound, 35.0) == 34.0
    assert required_of_plan(bound.model_copy(update={"half_db": 31.0}), 35.0) == 28.0
    assert required_of_plan(bound.model_copy(update={"half_db": 90.0}), 35.0) == 34.0
    assert required_of_plan(PlanBound(stability_db=90.0, float_db=50.0, half_db=80.0), 35.0) == 35.0


@pytest.mark.parametrize(("text", "expected"), [("57.31", 57.31), ("nan", None), ("inf", None), ("<b>", None)])
def test_a_prediction_is_read_from_an_artifact_whatever_it_says(text, expected):
    assert predicted_db({PREDICTED: text}) == expected
    assert predicted_db({}) is None
