"""What verification found, as data: `reports/parity.json`. Imports no torch."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

from edgegen.bundle.manifest import Gates
from edgegen.lower.backend import Delegation, HeldTo


class Outcome(StrEnum):
    """How far one artifact came, and what stopped it; the last stage that was reached names the outcome."""

    SUCCESS = "SUCCESS"
    UNDELEGATED = "UNDELEGATED"
    """The numbers agree, and the delegate does not take all of it although that was required, or takes none of it."""
    LOWER_FAIL = "LOWER_FAIL"
    LOAD_FAIL = "LOAD_FAIL"
    RUN_FAIL = "RUN_FAIL"
    MISMATCH = "MISMATCH"
    NOT_EXECUTED = "NOT_EXECUTED"
    """This host cannot execute the artifact. Never a pass."""


class _Model(BaseModel):
    # Infinity and NaN are values here (equal to the bit; not finite), and JSON has no numbers for them.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Unavailable(_Model):
    """Stands where an executable would: the artifact that could not be made, loaded, or executed on this host."""

    outcome: Literal[Outcome.LOWER_FAIL, Outcome.LOAD_FAIL, Outcome.NOT_EXECUTED]
    reason: str


class OutputParity(_Model):
    """One named output, worst case over every sample of the reference; `worst_at` names that sample."""

    output: str
    sqnr_db: float
    worst_at: str
    samples: int


class AlsoMeasured(_Model):
    """A comparison beside the one that the gate is about: `what` against what, worst case over the calls of one
    picture; `sqnr_db` None where it could not be made, and `what` says why."""

    what: str
    sqnr_db: float | None
    worst_at: str | None = None


class ComponentParity(_Model):
    """One artifact against the reference component, both given the reference's own inputs."""

    component: str
    outcome: Outcome
    reason: str | None = None
    sqnr_db: float | None = None
    """Worst over outputs; None when nothing was measured."""
    outputs: tuple[OutputParity, ...] = ()
    delegation: Delegation | None = None
    required_db: float | None = None
    """What `sqnr_db` has to reach; None where it was not measured."""
    float_db: float | None = None
    """Under a plan: against the float student, while `sqnr_db` is against what the plan computes."""
    required_float_db: float | None = None
    predicted_db: float | None = None
    """What float16 arithmetic, emulated on the lowered graph, leaves of the signal: an artifact that has less lost it
    elsewhere. None at other precisions."""
    also: tuple[AlsoMeasured, ...] = ()
    blame: str | None = None
    """Where reference and artifact part ways, for a component that failed or that was asked about."""


class PictureParity(_Model):
    """The compiled loop end to end from fixed noise: nothing of the reference is fed back in."""

    prompt: str
    seed: int
    steps: int
    psnr_db: float
    latent_sqnr_db: tuple[float, ...]
    """After each step."""


class SensitivityStep(_Model):
    """std(output for A - output for B) at the reference's latents of A, compiled and reference.

    `ratio` is compiled / reference; `cosine` is the agreement of the two differences' directions, which a swap of the
    prompts turns to -1 while the ratio stays 1. Both are None where the reference itself ignores the prompt
    (`degenerate`), or where nothing finite came out.
    """

    prompt_a: str
    prompt_b: str
    step: int
    steps: int
    reference_std: float
    compiled_std: float
    output_std: float
    """std of the reference's output for A, to judge the size of the two others."""
    ratio: float | None
    cosine: float | None
    degenerate: bool


class FailedGate(_Model):
    """One threshold that was not met."""

    gate: Literal["execution", "sqnr", "sqnr_to_float", "float16", "picture_psnr", "sensitivity", "delegation"]
    subject: str
    measured: str
    required: str


class ParityReport(_Model):
    """One backend's artifacts against the reference student."""

    backend: str
    precision: HeldTo
    executed_by: str | None = None
    """Who executed the artifacts in place of the runtime that they are for; None for that runtime."""
    status: Literal["passed", "failed", "not_executed"]
    """`not_executed` whenever an artifact could not run here and nothing else failed."""
    components: tuple[ComponentParity, ...]
    pictures: tuple[PictureParity, ...] = ()
    sensitivity: tuple[SensitivityStep, ...] = ()
    gates: Gates
    failed: tuple[FailedGate, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every artifact was executed here and every gate was met."""
        return self.status == "passed"

    @property
    def worst_sqnr_db(self) -> float | None:
        """Over components; None when none was measured."""
        return min((part.sqnr_db for part in self.components if part.sqnr_db is not None), default=None)

    @property
    def worst_psnr_db(self) -> float | None:
        """Over pictures; None when none was drawn."""
        return min((picture.psnr_db for picture in self.pictures), default=None)

    @property
    def worst_sensitivity(self) -> SensitivityStep | None:
        """The step that is furthest from the reference; None when the reference ignores the prompt everywhere."""
        return max((step for step in self.sensitivity if not step.degenerate), key=_distance, default=None)


def _distance(step: SensitivityStep) -> float:
    """How far a step is from perfect: in the ratio or in the direction, whichever is worse."""
    if step.ratio is None or step.cosine is None:
        return math.inf
    return max(abs(step.ratio - 1.0), 1.0 - step.cosine)
