"""What a user asks of a plan, and what comes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field

from edgegen.precision.budget import Aim, Budget
from edgegen.precision.file import Notes
from edgegen.precision.plan import OpPrecision, Precision, PrecisionPlan

if TYPE_CHECKING:
    from torch import Tensor

    from edgegen.precision.mend import Repair

DEFAULT_PSNR = 30.0
DEFAULT_CONDITIONING = 0.05


class PlanOptions(BaseModel):
    """What a user asks of a plan; None leaves it to the target, the student or nobody.

    `max_latency` is a share of fp32's, `max_latency_ms` of one picture, `max_size` bytes of weights, `max_size_ratio` a
    share of fp32's, `min_psnr` dB of the picture against the float student (SQNR where there is no picture),
    `max_conditioning` a share, `min_alignment` a share of prompts (the `shapes` student alone). Where nothing is asked
    for, 30 dB and 5 % are kept and the estimated latency is made small.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    precisions: tuple[str, ...] | None = None
    """Compressed precisions that may be used; None: all that the target executes."""
    precision: Precision | None = None
    """Of what is not compressed."""
    steps: int | None = None
    """Whose picture is judged; None: of every number that the student serves, its default above all."""
    max_latency: float | None = None
    max_latency_ms: float | None = None
    max_size: int | None = None
    max_size_ratio: float | None = None
    like: dict[str, dict[str, OpPrecision]] | None = None
    """Component -> module path -> precision, the float where not named: a plan may cost as much with each backend as
    this one would, and as many bytes. In place of the four above."""
    min_psnr: float | None = None
    max_conditioning: float | None = None
    min_alignment: float | None = None
    aim: Aim | None = None
    repairs: bool = False
    """Scales moved, weights rounded, biases corrected and the schedule learned, where each helps: `edgegen plan` asks
    for it. Such a plan has tensors beside it, so `write_planned` is what writes it."""
    qat: Annotated[int, Field(ge=1)] | None = None
    """At most so many steps of training after the repairs; None: none. Tensors as with `repairs`."""
    samples: int = 4
    """That sensitivity is estimated on."""
    judged: Annotated[int, Field(ge=2)] = 32
    """Pairs of prompts that a whole plan is judged on; large students have fewer."""
    projections: int = 6
    confirmed: int = 12
    """So many of the greatest effects are measured."""
    spread: int = 24
    """So many more, evenly over the others, so that the estimate's ranks can be judged."""
    alignment_prompts: int = 120
    seed: int = 1000
    """Sample i is drawn from `seed` + i."""
    calibration: Path | None = None
    """A file of prompts; None: what ships for this student."""

    def budget(self, latency: Mapping[str, float] | None, size: int | None) -> Budget:
        """With what the ratios and milliseconds are of this student: backend -> share of fp32's, and bytes."""
        floors = (self.min_psnr, self.min_alignment)
        least = self.min_psnr
        unbounded = latency is None and size is None
        if floors == (None, None) and (unbounded or self.aim in ("latency", "size")):
            least = DEFAULT_PSNR
        quality = least is not None or self.min_alignment is not None
        conditioning = self.max_conditioning
        if conditioning is None and quality:
            conditioning = DEFAULT_CONDITIONING
        aim: Aim = self.aim or ("latency" if quality else "loss")
        return Budget(latency, size, least, conditioning, self.min_alignment, aim)

    def asked(self, budget: Budget) -> dict[str, float]:
        """What a build of the plan is held to: the budget's quality, by the names of the options."""
        found = {"min_psnr": budget.psnr, "max_conditioning": budget.conditioning}
        return {name: value for name, value in found.items() if value is not None}


class Progress(Protocol):
    """Where a plan says what it is doing, as a build's."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Planned:
    """A plan and how it came about; `notes` are for its file."""

    plan: PrecisionPlan
    notes: Notes
    rank_correlation: float | None
    """Spearman's, of the estimated effects with the measured ones."""
    confirmed: int
    """Ops whose effect was measured alone."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What repairs changed, `component/call:place`: the content of the file beside the plan's."""
    repairs: tuple[Repair, ...] = ()
    """What each repair did, and why others did nothing."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Component -> precision -> ops."""
        return {
            name: dict(Counter(op.precision for op in part.ops.values())) for name, part in self.plan.components.items()
        }

    def summary(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "student": self.plan.student,
            "target": self.plan.target,
            "backends": list(self.plan.backends),
            "counts": self.counts(),
            "predicted": self.plan.predicted,
            "rank_correlation": self.rank_correlation,
            "confirmed": self.confirmed,
            "repairs": [one.model_dump() for one in self.repairs],
            "front": [point.model_dump() for point in self.plan.front],
        }
