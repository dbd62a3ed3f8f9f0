"""Our rows of the int8 benchmarks: the plain export, our fp32 artifact, and plans made as `edgegen plan` makes them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from int8_rows import Failed, Made, runner
from lines import Lines
from subjects import Subject
from turns import request_of

from edgegen.build.graphs import Graphs
from edgegen.cache import Cache
from edgegen.errors import EdgegenError, GateError
from edgegen.lower.backend import LowerRequest, get_backend
from edgegen.precision.canonical import canonical_passes, timesteps_of
from edgegen.precision.options import Planned, PlanOptions
from edgegen.precision.planner import make_plan
from edgegen.precision.repair.tensors import Tensors
from edgegen.rewrite.choose import shape_preset
from edgegen.rewrite.pipeline import Pipeline
from edgegen.targets import load_target

APPLE = ("coreml", "coreai")
"""Computed here, and not timed: their latency is a device's."""
CPU_TARGET, APPLE_TARGET = "linux-x86", "iphone17"
APPLE_PLANS = {
    "w8": PlanOptions(precisions=("w8",), precision="fp32", aim="loss", max_size_ratio=1.0, repairs=True),
    "w8a8": PlanOptions(precisions=("w8a8",), precision="fp32", aim="loss", max_size_ratio=1.0, repairs=True),
}
"""As `equal` of those below, with float32 between, so that quantization is all that is compared."""
PLANS = {
    "fast": PlanOptions(min_psnr=28.0, repairs=True),
    "fine": PlanOptions(min_psnr=29.6, repairs=True),
    "faithful": PlanOptions(aim="loss", max_size_ratio=0.262, max_latency=0.42, repairs=True),
    "equal": PlanOptions(aim="loss", max_size_ratio=1.0, repairs=True),
}
"""`fast` and `fine`: the least estimated latency at 28 and at 29 dB, with some tenths for inputs that were not planned
on; `faithful`: the least loss that int8's bytes and an estimated 0.42 of fp32's latency allow; `equal`: the least loss
at the fewest bytes that the runtime's precisions allow, which is what whole-int8 recipes have."""
SIZES = (0.2525, 0.255, 0.2575, 0.26, 0.265, 0.27, 0.28, 0.3, 0.35, 0.4)
"""Shares of fp32's bytes that `equal` is tried with, from the least on."""
PLAIN = "plain fp32"


@dataclass(frozen=True)
class Ours:
    """One network on one backend; `graphs` and `cache` are shared among those of one run."""

    subject: Subject
    backend: str
    cache: Cache
    folder: Path
    graphs: Graphs = field(default_factory=Graphs)

    @cached_property
    def plain(self) -> tuple[LowerRequest, Path]:
        """The network as it was exported, through the backend and nothing else: what the runtimes' tools start from."""
        at = self.folder / "plain"
        at.mkdir()
        with torch.no_grad():
            program = torch.export.export(self.subject.module, self.subject.example)
        request = request_of(program, at)
        return request, at / get_backend(self.backend).lower(program, request).file

    def rows(self, plans: Sequence[str]) -> Iterator[Made | Failed]:
        started = time.perf_counter()
        request, path = self.plain
        run = runner(self.subject, self.backend, path, request)
        yield Made(PLAIN, path, run, lowering_s=time.perf_counter() - started)
        offered = APPLE_PLANS if self.backend in APPLE else {name: PLANS[name] for name in plans}
        for name, options in offered.items():
            started = time.perf_counter()
            try:
                planned = self._planned(options)
                quantizing = time.perf_counter() - started
                yield self._lowered(name, planned, quantizing)
            except EdgegenError as error:
                yield Failed(f"edgegen, {name}", error.message.splitlines()[0])

    def _planned(self, options: PlanOptions) -> Planned:
        target = load_target(APPLE_TARGET if self.backend in APPLE else CPU_TARGET)
        sizes = SIZES if options.max_size_ratio == 1.0 else (options.max_size_ratio,)
        for size in sizes:
            asked = options.model_copy(update={"max_size_ratio": size})
            try:
                return make_plan(self.subject.student, target, (self.backend,), asked, self.cache, Lines())
            except GateError:
                if size == sizes[-1]:
                    raise
        raise AssertionError("there is no size to try")

    def _lowered(self, name: str, planned: Planned, quantizing: float) -> Made:
        started = time.perf_counter()
        part, on = self.subject.part, get_backend(self.backend)
        canonical = canonical_passes(part.name, timesteps_of(self.subject.student), (self.backend,))
        shape = Pipeline(tuple(shape_preset(self.backend)))
        plan = planned.plan.components[part.name]
        tensors = by_component(planned).get(part.name, {})
        graph = self.graphs.planned(
            part, canonical, shape, plan, tensors, (), half=None, quantizes=on.quantizes or "graph"
        )
        at = self.folder / name
        at.mkdir()
        request = replace(request_of(graph.program, at), quantized=graph.quantized)
        lowered = on.lower(graph.program, request)
        run = runner(self.subject, self.backend, at / lowered.file, request)
        counts = ", ".join(f"{count} {precision}" for precision, count in sorted(planned.counts()[part.name].items()))
        seconds = time.perf_counter() - started
        return Made(f"edgegen, {name}", at / lowered.file, run, quantizing, seconds, counts)


def by_component(planned: Planned) -> dict[str, Tensors]:
    """What repairs changed: component -> place -> tensor."""
    found: dict[str, Tensors] = {}
    for name, tensor in planned.tensors.items():
        component, _, rest = name.partition("/")
        found.setdefault(component, {})[rest] = tensor
    return found
