"""The thresholds an artifact must meet, and what happens when it does not: exit 3 with the table. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from edgegen.bundle.manifest import Gates, PlanBound
from edgegen.errors import GateError
from edgegen.lower.backend import Delegation
from edgegen.precision.plan import PrecisionPlan
from edgegen.verify.metrics import Sensitivity
from edgegen.verify.outcome import ComponentParity, FailedGate, Outcome, ParityReport, PictureParity, SensitivityStep


def default_gates(plan: PrecisionPlan | None = None, *, require_full_delegation: bool = False) -> Gates:
    """fp32 / fp16: SQNR >= 60 / 40 dB per component, picture PSNR >= 45 / 35 dB, sensitivity within 2 %.

    With a plan: SQNR >= 35 dB against what the plan itself computes (60 where it is float32 between its codes), PSNR
    and sensitivity against the student as the plan was asked for, or 30 dB and 5 %.
    """
    asked = {} if plan is None else plan.budget
    return Gates(
        sqnr_db={"fp32": 60.0, "fp16": 40.0, "plan": 35.0},
        picture_psnr_db={"fp32": 45.0, "fp16": 35.0, "plan": asked.get("min_psnr", 30.0)},
        sensitivity_tolerance=0.02 if plan is None else asked.get("max_conditioning", 0.05),
        require_full_delegation=require_full_delegation,
    )


HALF_SLACK_DB = 6.0
"""How much less than emulated float16 arithmetic predicts an artifact may have: a converter orders and fuses
operations as it likes, and the prediction is made on fewer samples."""


PLAN_FLOAT32_DB = 60.0
"""As of a float32 artifact: one whose int8 codes are the reference's has nothing but float32 to differ in."""
PLAN_SLACK_DB = 3.0
"""Two roundings of the same plan, each as far from the exact one as the other."""
PLAN_FLOAT_SLACK_DB = 1.0
"""How much more than its plan an artifact may lose of the float student."""


def required_of_plan(bound: PlanBound, threshold: float) -> float:
    """dB that an artifact must reach against the fake-quant reference: what the bound asks for, else `threshold`, or
    what that reference repeats of itself where it is less: under another order of sums, in float16 under its rounding.
    """
    asked = threshold if bound.asked_db is None else bound.asked_db
    repeats = bound.stability_db if bound.half_db is None else min(bound.stability_db, bound.half_db)
    return min(asked, repeats - PLAN_SLACK_DB)


def required_of_float(bound: PlanBound) -> float:
    """dB that an artifact must keep of the float student: what its plan keeps in float32, less `PLAN_FLOAT_SLACK_DB`.

    In float16 the noise of that arithmetic comes on top, and powers of noises add: a plan of 61 dB whose numbers
    float16 leaves at 64 dB cannot keep more than 59.
    """
    noise = math.pow(10.0, -bound.float_db / 10.0)
    if bound.half_db is not None:
        noise += math.pow(10.0, -bound.half_db / 10.0)
    return -10.0 * math.log10(max(noise, 1e-30)) - PLAN_FLOAT_SLACK_DB


def meets(measured: float | None, required: float) -> bool:
    """Whether a number was measured and reaches `required`; NaN never does."""
    return measured is not None and not math.isnan(measured) and measured >= required


def sensitivity_met(step: SensitivityStep, tolerance: float, sqnr_gate: float) -> bool:
    """Ratio within `tolerance` of 1, and the direction as close as noise of that size leaves it: see `heard`.

    Noise n (relative to the reference's difference) makes the ratio sqrt(1 + n^2) and the cosine 1 / sqrt(1 + n^2), so
    the same tolerance bounds both. Where the reference ignores the prompt the artifact has to ignore it too: it may not
    move by more than the noise that the SQNR gate allows.
    """
    if step.degenerate:
        return step.compiled_std <= step.output_std * math.pow(10.0, -sqnr_gate / 20.0)
    change = heard(step, tolerance, sqnr_gate)
    return change is not None and change <= tolerance


MOST_NOISE_DB = 35.0
"""As plans may have."""


def least_heard(tolerance: float, sqnr_gate: float) -> float:
    """Of the answer's own std, the least difference between two prompts that `tolerance` can be asked of.

    Noise n in each of two answers, the most that the SQNR gate lets pass, is sqrt(2) n in their difference d, and makes
    its norm sqrt(d^2 + 2 n^2): within the tolerance where d >= sqrt(2) n / sqrt((1 + tolerance)^2 - 1). That is 0.079
    for plans (35 dB, 5 %), 0.070 for fp16 and 0.007 for fp32 (2 %). A gate that somebody lowered further says nothing
    about prompts: no more noise than `MOST_NOISE_DB` counts.
    """
    return (
        math.sqrt(2.0)
        * math.pow(10.0, -max(sqnr_gate, MOST_NOISE_DB) / 20.0)
        / math.sqrt(max(1e-9, (1.0 + tolerance) ** 2 - 1.0))
    )


def heard(step: SensitivityStep | Sensitivity, tolerance: float, sqnr_gate: float) -> float | None:
    """By what share the artifact changes the norm or the direction of what another prompt changes, the greater of both;
    0 is the reference itself, and one that ignores the prompt comes to 1. None where nothing finite came out.

    A share of a difference that is smaller than `least_heard` would judge the noise that the SQNR gate allows, not how
    prompts are heard: its error is then taken as if it were one of a difference of that size. The shipped student's
    differences are 0.1 to 1.4 of its answers (520 steps of 130 pairs: nothing changes for it), an untrained one's
    0.003, of which rounding at 46 dB is more than all. An artifact that ignores the prompt still fails wherever the
    reference's difference is more than `tolerance` of that size: 0.4 % of the answer for plans, 0.15 and 0.015 % for
    fp16 and fp32, less than the SQNR gate could see.
    """
    if step.ratio is None or step.cosine is None:
        return None
    least = max(step.reference_std, least_heard(tolerance, sqnr_gate) * step.output_std)
    along = least + step.compiled_std * step.cosine - step.reference_std
    across = step.compiled_std * math.sqrt(max(0.0, 1.0 - step.cosine**2))
    norm = math.hypot(along, across)
    turned = norm / along - 1.0 if along > 0.0 else 1.0
    return max(abs(norm / least - 1.0), turned)


def delegation_met(delegation: Delegation | None) -> bool:
    """Whether one piece is known to take every op; unknown is not met."""
    return delegation is not None and delegation.full


def check(
    gates: Gates,
    precision: str,
    components: Iterable[ComponentParity],
    pictures: Iterable[PictureParity] = (),
    sensitivity: Iterable[SensitivityStep] = (),
) -> tuple[FailedGate, ...]:
    """Every gate that was not met; an artifact that cannot be executed here can fail none but delegation."""
    failed: list[FailedGate] = []
    sqnr, psnr = gates.sqnr_db[precision], gates.picture_psnr_db[precision]
    for part in components:
        if part.outcome in (Outcome.LOWER_FAIL, Outcome.LOAD_FAIL, Outcome.RUN_FAIL):
            measured = f"{part.outcome}: {part.reason}"
            failed.append(FailedGate(gate="execution", subject=part.component, measured=measured, required="executes"))
        elif part.outcome is not Outcome.NOT_EXECUTED:
            least = sqnr if part.required_db is None else part.required_db
            if not meets(part.sqnr_db, least):
                measured = part.reason if part.sqnr_db is None and part.reason else decibels(part.sqnr_db)
                required = f">= {round(least, 1):g} dB"
                failed.append(FailedGate(gate="sqnr", subject=part.component, measured=measured, required=required))
        if part.required_float_db is not None and not meets(part.float_db, part.required_float_db):
            measured, required = decibels(part.float_db), f">= {part.required_float_db:.1f} dB, as its plan has"
            failed.append(
                FailedGate(gate="sqnr_to_float", subject=part.component, measured=measured, required=required)
            )
        if part.sqnr_db is not None and part.predicted_db is not None:
            least = part.predicted_db - HALF_SLACK_DB
            if not meets(part.sqnr_db, least):
                required = f">= {least:.1f} dB, float16 predicts {part.predicted_db:.1f}"
                failed.append(
                    FailedGate(
                        gate="float16", subject=part.component, measured=decibels(part.sqnr_db), required=required
                    )
                )
        if gates.require_full_delegation and not delegation_met(part.delegation):
            measured = describe_delegation(part.delegation)
            failed.append(
                FailedGate(gate="delegation", subject=part.component, measured=measured, required="one piece, all ops")
            )
    for picture in pictures:
        if not meets(picture.psnr_db, psnr):
            subject = f"“{picture.prompt}”, {picture.steps} steps"
            measured = decibels(picture.psnr_db)
            failed.append(
                FailedGate(gate="picture_psnr", subject=subject, measured=measured, required=f">= {psnr:g} dB")
            )
    for step in sensitivity:
        if not sensitivity_met(step, gates.sensitivity_tolerance, sqnr):
            subject = f"step {step.step} of {step.steps}, “{step.prompt_a}” against “{step.prompt_b}”"
            required = f"1 ± {gates.sensitivity_tolerance:g}, same direction"
            failed.append(
                FailedGate(gate="sensitivity", subject=subject, measured=describe_sensitivity(step), required=required)
            )
    return tuple(failed)


def require(reports: Sequence[ParityReport]) -> None:
    """GateError with the table of what was not met and where reference and artifact part ways.

    Artifacts that could not be executed here raise nothing, and are no pass either: see `ParityReport.status`.
    """
    broken = [report for report in reports if report.failed]
    if not broken:
        return
    rows = [(r.backend, f.gate, f.subject, f.measured, f.required) for r in broken for f in r.failed]
    count = "1 gate was" if len(rows) == 1 else f"{len(rows)} gates were"
    lines = [f"{count} not met", "", *_table(("backend", "gate", "where", "measured", "required"), rows)]
    for report in broken:
        lines += [f"{report.backend}: {part.blame}" for part in report.components if part.blame]
    raise GateError("\n".join(lines))


def decibels(value: float | None) -> str:
    """`52.1 dB`; `equal` for identical; `not finite` for NaN and what follows from it."""
    if value is None:
        return "not measured"
    if math.isnan(value) or value == -math.inf:
        return "not finite or no signal"
    return "equal" if value == math.inf else f"{value:.1f} dB"


def describe_sensitivity(step: SensitivityStep) -> str:
    """The measured numbers of one step, in words."""
    if step.degenerate:
        return f"reference ignores the prompt (std {step.reference_std:.2g}), artifact std {step.compiled_std:.2g}"
    if step.ratio is None or step.cosine is None:
        return "not finite"
    return f"ratio {step.ratio:.4f}, direction {step.cosine:.4f}"


def describe_delegation(delegation: Delegation | None) -> str:
    """How much the delegate takes, or why that is not known."""
    if delegation is None or not delegation.known:
        return "unknown" + (f": {delegation.note}" if delegation and delegation.note else "")
    counts = f"{delegation.delegated_ops} of {delegation.total_ops} ops in {delegation.pieces} pieces"
    outside = ", ".join(f"{op} x{n}" for op, n in sorted(delegation.undelegated.items(), key=lambda kv: -kv[1])[:4])
    return f"{counts}; outside: {outside}" if outside else counts


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    made = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    return [made[0], "  ".join("-" * width for width in widths), *made[1:]]
