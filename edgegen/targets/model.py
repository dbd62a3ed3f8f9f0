"""What a target file says. Three kinds of file, joined into one `Target`:

a device (`targets/<name>.toml`) names its chipset (`chipsets/<name>.toml`: silicon) and, for each runtime, the delegate
(`delegates/<name>.toml`: the software that takes a graph, and the ops that it leaves out). Unknown keys are
refused everywhere, and nothing is denied without a reason and a reference.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

BackendName = Literal["coreml", "coreai", "executorch", "tflite", "onnx"]
BuildPrecision = Literal["fp32", "fp16"]
"""Precisions that this version builds."""
ExecutablePrecision = Literal["fp32", "fp16", "w8a8", "w8a8-dynamic", "w8", "w6", "w4"]
"""What a runtime may execute natively: w8a8 is int8 arithmetic with static or dynamic activation ranges; w8, w6 and w4
are weights that stay compressed in the file and are computed with in float."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=63)]
Text = Annotated[str, Field(min_length=1, max_length=600)]
Version = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+){0,2}$", max_length=20)]

OPTIONS: dict[str, dict[str, frozenset[str] | None]] = {
    "coreml": {
        "minimum_deployment_target": frozenset({"iOS16", "iOS17", "iOS18", "iOS26"}),
        "package": frozenset({"components", "one"}),
    },
    "coreai": {},
    "executorch": {},
    "tflite": {},
    "onnx": {"opset": frozenset(str(opset) for opset in range(17, 24))},
}
"""Lowering options of each backend and their values."""
PACKAGING, PACKAGE = "coreml", "package"
"""The backend and its option that say whether components are packages (the default) or functions of one."""
WITH_FUNCTIONS = frozenset({"iOS18", "iOS26"})
"""Deployment targets whose packages may have several functions."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Denial(_Model):
    """`reference`: title and section of what says so, or `measured: ...` for what this project found by running it."""

    reason: Text
    reference: Text


Place = Literal["first", "last", "strided", "transposed"]
"""Which ops of a network: those that read its input, those that give its output, those that halve a picture, and
transposed convolutions."""
QuantizableOp = Literal["conv", "linear", "matmul"]


class DeniedOp(Denial):
    """`op`: ATen name (`aten.native_group_norm`) with or without overload; `when`: only in this case.

    `precisions`: the op runs, and only these precisions of it are denied: no plan uses them. `where`: only there.
    """

    op: Annotated[str, Field(pattern=r"^aten\.[a-z0-9_]+(\.[A-Za-z0-9_]+)?$|^\*$", max_length=100)]
    when: Text | None = None
    precisions: tuple[ExecutablePrecision, ...] = ()
    where: tuple[Place, ...] = ()

    @model_validator(mode="after")
    def _agrees(self) -> DeniedOp:
        if self.precisions and self.when is None:
            raise ValueError("precisions want a `when` that says the same in words")
        if self.where and not self.precisions:
            raise ValueError("where is of denied precisions: there are none")
        return self


class PrecisionCost(_Model):
    """What a precision costs: `time` is that of a multiply-accumulate of a large op in it over the same in fp32. What
    small ops take besides: `values` for each value that the op reads and writes, `call` for each call, both in
    multiply-accumulates of fp32 that take as long; where they are not said, fp32's, and without those nothing. `form`
    and `group` are those of `edgegen.precision.plan.OpPlan`: how the runtime keeps such weights. `float_output`: a
    kernel gives float from integer sums, so that the output goes through no codes of its own. `reference`: as that of a
    denial, or `assumed: ...`; a plan's latency is an estimate by it."""

    op: QuantizableOp
    precision: ExecutablePrecision
    time: Annotated[float, Field(gt=0, le=100)]
    values: Annotated[float, Field(ge=0, le=1e6)] | None = None
    call: Annotated[float, Field(ge=0, le=1e9)] | None = None
    form: Literal["affine", "palette"] = "affine"
    group: Annotated[int, Field(ge=0, le=1024)] = 0
    float_output: bool = False
    reference: Annotated[str, Field(pattern=r"^(measured|assumed|read): .", max_length=600)]


class Widths(_Model):
    """Channels come in multiples of `multiple` for the kernels to compute nothing in vain: what is pruned is cut to
    such widths. `reference`: as that of a cost."""

    multiple: Annotated[int, Field(ge=1, le=256)]
    reference: Annotated[str, Field(pattern=r"^(measured|assumed|read): .", max_length=600)]


class DeniedBackend(Denial):
    backend: BackendName


Condition = Literal[
    "alpha is 1",
    "batch of 2 or more",
    "finite fill",
    "first result only",
    "keeps the axes",
    "last axis",
    "no ceil mode",
    "no cropping",
    "no mask of truths",
    "no padding counted",
    "not fp16",
    "not on the timestep",
    "one dtype",
    "one or two spatial axes",
    "power of 0.5 or 2",
    "power of 2",
    "rank 4",
    "rank at most 4",
    "rank at most 5",
    "same dtype",
    "scale is not all ones",
    "spatial axes",
    "static weights",
    "step of 1",
    "stride within the kernel",
    "trailing axis",
    "two or more tensors",
    "zero fill",
]
"""What a delegate may ask of an op; `edgegen.rewrite.forecast` says of each whether a node meets it."""


class TakenOp(_Model):
    """An op that a delegate takes when all of `only` hold. `op`: ATen name with overload, as it stands after torch's
    core decompositions, or one that the converter keeps from being decomposed; `*` stands for every op that no other
    entry names, and what it asks is asked of all."""

    op: Annotated[str, Field(pattern=r"^aten\.[a-z0-9_]+\.[A-Za-z0-9_]+$|^\*$", max_length=100)]
    only: tuple[Condition, ...] = ()


class Taken(_Model):
    """All that a delegate takes. `dtypes` are those of the tensors that it reads and gives, all where it is empty;
    what no entry of `ops` names is left outside. `casts_whole_numbers`: an integer written among floats becomes a
    constant and a cast outside. `folds_constants`: the converter computes what depends on no input."""

    reference: Text
    folds_constants: bool = False
    casts_whole_numbers: bool = False
    dtypes: tuple[Literal["float32", "float16"], ...] = ()
    ops: Annotated[tuple[TakenOp, ...], Field(min_length=1)]


class Delegate(_Model):
    """What takes (part of) a graph within a runtime. `takes`: what is known of how it cuts a graph, for a forecast.
    `costs`: of what plans may use here; a precision without a cost is not chosen."""

    name: Name
    title: Text
    runtime: BackendName
    denied_ops: tuple[DeniedOp, ...] = ()
    costs: tuple[PrecisionCost, ...] = ()
    widths: Widths | None = None
    takes: Taken | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Delegate:
        priced = [(cost.op, cost.precision) for cost in self.costs]
        for one in priced:
            if priced.count(one) > 1:
                raise ValueError(f"costs has {one[0]} in {one[1]} twice")
        return self


class Accelerator(_Model):
    """One unit of a chipset; `native` is the arithmetic that its hardware has."""

    kind: Literal["cpu", "gpu", "npu"]
    title: Text
    native: tuple[Literal["fp32", "fp16", "bf16", "int8", "int4"], ...]
    reference: Text


class Chipset(_Model):
    name: Name
    title: Text
    maker: Text
    accelerators: Annotated[tuple[Accelerator, ...], Field(min_length=1)]


class OperatingSystem(_Model):
    """`floor`: the oldest version that bundles for this target must run on."""

    name: Literal["iOS", "iPadOS", "Android", "Linux", "browser"]
    floor: Version


class AppMemory(_Model):
    """What one app may use before the system ends it. `known`: `documented` by the maker, `reported` by others who
    measured it, or `assumed`."""

    bytes: Annotated[int, Field(strict=True, ge=2**20, le=2**40)]
    known: Literal["documented", "reported", "assumed"]
    source: Text


class Speed(_Model):
    """How fast fp32 networks ran here: what an estimate in milliseconds starts from."""

    macs_per_second: Annotated[float, Field(gt=0, le=1e16)]
    reference: Annotated[str, Field(pattern=r"^measured: .", max_length=600)]


class Runtime(_Model):
    """One backend on one device. A precision that is not among `precisions` is refused, never emulated.

    `delegates`: in the order in which they are offered the graph. `stored_only`: those of `precisions` that make the
    file smaller while arithmetic stays float32, each with a note. `notes`: precision -> what to know of it here.
    `speed`: without it latencies are known as ratios only.
    """

    backend: BackendName
    delegates: Annotated[tuple[Name, ...], Field(min_length=1)]
    precisions: Annotated[tuple[ExecutablePrecision, ...], Field(min_length=1)]
    default_precision: BuildPrecision
    stored_only: tuple[ExecutablePrecision, ...] = ()
    options: dict[str, str] = {}
    denied_ops: tuple[DeniedOp, ...] = ()
    notes: dict[ExecutablePrecision, Text] = {}
    speed: Speed | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Runtime:
        if len(set(self.precisions)) != len(self.precisions):
            raise ValueError("a precision is listed twice")
        if self.default_precision not in self.precisions:
            raise ValueError(f"default_precision {self.default_precision} is not among precisions")
        if stray := sorted(set(self.notes) - set(self.precisions)):
            raise ValueError(f"notes on {stray[0]}, which is not among precisions")
        for stored in self.stored_only:
            if stored not in self.precisions or stored not in self.notes:
                raise ValueError(f"stored_only names {stored}, which has to be among precisions and have a note")
        known = OPTIONS[self.backend]
        for option, value in self.options.items():
            if option not in known:
                raise ValueError(f"option {option} is unknown to {self.backend}")
            values = known[option]
            if values is not None and value not in values:
                raise ValueError(f"option {option} cannot be {value}: choose from {', '.join(sorted(values))}")
        if self.options.get(PACKAGE) == "one" and self.options.get("minimum_deployment_target") not in WITH_FUNCTIONS:
            raise ValueError("option package cannot be one before minimum_deployment_target iOS18")
        return self


class Device(_Model):
    """A device file. `runtimes` is in order of preference; `memory` is what the machine has."""

    name: Name
    title: Text
    chipset: Name
    memory_bytes: Annotated[int, Field(strict=True, ge=2**20, le=2**42)]
    os: OperatingSystem
    app_memory: AppMemory
    runtimes: Annotated[tuple[Runtime, ...], Field(min_length=1)]
    denied_backends: tuple[DeniedBackend, ...] = ()

    @model_validator(mode="after")
    def _agrees(self) -> Device:
        names = [runtime.backend for runtime in self.runtimes] + [denied.backend for denied in self.denied_backends]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"backend {name} is listed twice, or both offered and denied")
        if self.app_memory.bytes > self.memory_bytes:
            raise ValueError("app_memory.bytes is more than memory_bytes")
        return self


@dataclass(frozen=True)
class BackendOnTarget:
    """One backend as `Target.backend` gives it; `denied_ops` are the device's own and those of the first delegate."""

    name: str
    delegates: tuple[Delegate, ...]
    options: dict[str, str]
    precisions: tuple[ExecutablePrecision, ...]
    default_precision: BuildPrecision
    stored_only: tuple[ExecutablePrecision, ...]
    denied_ops: tuple[DeniedOp, ...]
    notes: dict[ExecutablePrecision, str]
    speed: Speed | None = None

    @property
    def width_multiple(self) -> int:
        """Of channels, as the first delegate that says one wants them; 1 where none does."""
        return next((one.widths.multiple for one in self.delegates if one.widths is not None), 1)

    def cost(self, op: QuantizableOp, precision: ExecutablePrecision) -> PrecisionCost | None:
        """By the first delegate that says one; None where none does, so that no plan uses it."""
        for delegate in self.delegates:
            for cost in delegate.costs:
                if (cost.op, cost.precision) == (op, precision):
                    return cost
        return None

    def time(self, op: QuantizableOp, precision: ExecutablePrecision, macs: int, values: int) -> float:
        """Of an op of `macs` multiply-accumulates that reads and writes `values` values, over that of as many fp32
        multiply-accumulates in a large op. A float precision without a cost takes as long as fp32."""
        cost, plain = self.cost(op, precision), self.cost(op, "fp32")
        found = [] if plain is None else [plain]
        found += [] if cost is None else [cost]
        value = next((one.values for one in reversed(found) if one.values is not None), 0.0)
        call = next((one.call for one in reversed(found) if one.call is not None), 0.0)
        return (1.0 if cost is None else cost.time) + (value * values + call) / max(1, macs)


@dataclass(frozen=True)
class Target:
    """A device with its chipset and delegates resolved."""

    device: Device
    chipset: Chipset
    delegates: tuple[tuple[Delegate, ...], ...]
    """Those of each of `device.runtimes`, in the same order."""

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def title(self) -> str:
        return self.device.title

    @property
    def os_floor(self) -> str:
        return self.device.os.floor

    @property
    def app_memory_bytes(self) -> int:
        return self.device.app_memory.bytes

    @property
    def backends(self) -> tuple[str, ...]:
        """In order of preference."""
        return tuple(runtime.backend for runtime in self.device.runtimes)

    @property
    def denied_backends(self) -> dict[str, str]:
        """Backend -> why this device does not run it."""
        return {denied.backend: denied.reason for denied in self.device.denied_backends}

    def backend(self, name: str) -> BackendOnTarget:
        """What this device's runtime for backend `name` executes; KeyError when it is not among `backends`."""
        for runtime, delegates in zip(self.device.runtimes, self.delegates, strict=True):
            if runtime.backend == name:
                return BackendOnTarget(
                    name=name,
                    delegates=delegates,
                    options=dict(runtime.options),
                    precisions=runtime.precisions,
                    default_precision=runtime.default_precision,
                    stored_only=runtime.stored_only,
                    denied_ops=delegates[0].denied_ops + runtime.denied_ops,
                    notes=dict(runtime.notes),
                    speed=runtime.speed,
                )
        raise KeyError(name)

    @cached_property
    def sha256(self) -> str:
        """Over what the files say, not how they are written: comments and layout do not change it."""
        parts = (self.device, self.chipset, *(delegate for group in self.delegates for delegate in group))
        return hashlib.sha256("\n".join(part.model_dump_json() for part in parts).encode()).hexdigest()
