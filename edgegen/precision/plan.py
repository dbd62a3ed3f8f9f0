"""One precision for each quantizable op: data that a person reads and edits, and that every backend realises.

Ops are named by where they come from: the module path in the student, `#1`, `#2`, ... after it where one module makes
several. Rewrites keep that path, so one plan serves the graph of every backend. Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["fp32", "fp16"]
"""Of a whole component: its float arithmetic."""
OpPrecision = Literal["fp32", "fp16", "w8a8", "w8a8-dynamic", "w8", "w6", "w4"]
"""w8a8: int8 arithmetic, activations by calibrated ranges; w8a8-dynamic: int8 arithmetic, activations by the range they
have in each call; w8, w6, w4: weights are compressed in the file and computed with in the component's float."""
COMPRESSED: tuple[OpPrecision, ...] = ("w8a8", "w8a8-dynamic", "w8", "w6", "w4")
BITS: dict[OpPrecision, int] = {"fp32": 32, "fp16": 16, "w8a8": 8, "w8a8-dynamic": 8, "w8": 8, "w6": 6, "w4": 4}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(_Model):
    """Least and greatest value that a tensor is quantized for; what lies outside saturates."""

    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low <= self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class OpPlan(_Model):
    """How one op is computed. Scales and zero points follow from it (`edgegen.precision.encode`): none are stored."""

    op: Literal["conv", "linear", "matmul"]
    precision: OpPrecision
    form: Literal["affine", "palette"] = "affine"
    """Of compressed weights: whole numbers times a scale, symmetric, or indices into a table of 2^bits values."""
    group: Annotated[int, Field(ge=0)] = 0
    """affine: so many input channels share a scale, 0 for all of an output channel (w8a8 takes no other). palette: so
    many output channels share a table, 0 for all."""
    input: Range | None = None
    other: Range | None = None
    """The second operand of a matmul."""
    output: Range | None = None
    """None of a w8a8 linear: its sums become float without codes of their own."""
    step_inputs: tuple[Range, ...] = ()
    """Of each of the sampler's timesteps, where they disagree; the range that is used is `input`."""
    weights: int = 0
    """Elements of the weight."""
    macs: int = 0

    @model_validator(mode="after")
    def _agrees(self) -> OpPlan:
        if self.precision == "w8a8" and (self.input is None or (self.output is None and self.op != "linear")):
            raise ValueError("w8a8 wants the ranges `input` and, but for a linear, `output`")
        if self.precision == "w8a8" and self.op == "matmul" and self.other is None:
            raise ValueError("w8a8 of a matmul wants the range `other`")
        if self.op == "matmul" and self.precision in ("w8", "w6", "w4"):
            raise ValueError(f"a matmul has no weights to make {self.precision}")
        if self.precision.startswith("w8a8") and (self.form != "affine" or self.group):
            raise ValueError(f"{self.precision} takes affine weights with one scale an output channel")
        if self.precision == "w6" and self.form != "palette":
            raise ValueError("w6 is a palette: no runtime has six-bit integers")
        return self


class ComponentPlan(_Model):
    """`float_precision` is that of every op that is not named, and of what lies between quantized ones."""

    float_precision: Precision
    ops: dict[str, OpPlan] = {}

    @property
    def compressed(self) -> bool:
        """Whether any op is more than a float."""
        return any(one.precision in COMPRESSED for one in self.ops.values())


class Calibration(_Model):
    """What the ranges were observed on."""

    prompts: int
    seed: int
    steps: tuple[int, ...]
    sha256: str
    """Over prompts, seeds and settings."""


class FrontPoint(_Model):
    """One of the plans that could have been chosen: share of fp32's latency with the first backend and decibels of the
    picture, both estimated, and bytes."""

    latency_ratio: float
    bytes: int
    picture_psnr_db: float


class PrecisionPlan(_Model):
    """The plan of one student for one target; `tensors_sha256` is that of what repairs changed, a file beside it."""

    schema_version: Literal[2] = 2
    """1 had its ranges before the scale of attentions and the sums of upsamplings were folded."""
    student: str
    student_sha256: str
    target: str
    target_sha256: str
    backends: tuple[str, ...]
    """Whose native precisions it keeps to."""
    components: dict[str, ComponentPlan]
    calibration: Calibration | None = None
    repairs: tuple[str, ...] = ()
    """Those that changed weights, in order."""
    tensors_sha256: str | None = None
    budget: dict[str, float] = {}
    """What was asked of it, by the names of `edgegen plan`'s options: `min_psnr`, `max_latency`, ..."""
    sampler: dict[int, tuple[tuple[float, float], ...]] = {}
    """Steps -> factors of each step's (sample, prediction), learned on the quantized student (Q-Sched); none are 1."""
    predicted: dict[str, float] = {}
    """What the planner expected: `picture_psnr_db`, `bytes`, `latency_ratio`, ..."""
    front: tuple[FrontPoint, ...] = ()
    """From the fastest to the most faithful; the Pareto front that reports draw."""
