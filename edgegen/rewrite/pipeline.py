"""Ordered passes: the order is proven when a pipeline is made, and every pass leaves a record of what it did."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from torch.export import ExportedProgram

from edgegen.errors import UsageError
from edgegen.rewrite.base import Decline, Pass, Rewritten, census
from edgegen.rewrite.registry import parse


class PassRecord(BaseModel):
    """One pass of one run: what it was, what it changed, what it nearly did, how long it took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: str
    """The pass as it is written: name and options."""
    modified: bool
    ops_before: int
    ops_after: int
    removed: dict[str, int] = {}
    added: dict[str, int] = {}
    """Op -> how many more, or fewer, there are of it."""
    declined: tuple[Decline, ...] = ()
    seconds: float


Observer = Callable[[Pass, ExportedProgram, Rewritten], None]
"""Called after each pass with the graph before it and its result."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run. UsageError when that order breaks what one of them declares."""

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        problem = order_problem(self.passes)
        if problem is not None:
            raise UsageError(f"the passes cannot run in this order: {problem}", hint="edgegen passes list")

    def __str__(self) -> str:
        return ", ".join(str(one) for one in self.passes)

    def specs(self) -> tuple[str, ...]:
        """Each pass as it is written."""
        return tuple(str(one) for one in self.passes)

    def run(
        self, program: ExportedProgram, observers: Sequence[Observer] = ()
    ) -> tuple[ExportedProgram, tuple[PassRecord, ...]]:
        """All passes over `program`, which stays as it is. What a pass raises goes through as it is."""
        records = []
        for one in self.passes:
            started = time.perf_counter()
            result = one(program)
            seconds = time.perf_counter() - started
            records.append(_record(one, program, result, seconds))
            for observe in observers:
                observe(one, program, result)
            program = result.program
        return program, tuple(records)


def order_problem(passes: Sequence[Pass]) -> str | None:
    """The first declared constraint that this order breaks, in words, or None."""
    names = [one.name for one in passes]
    for place, one in enumerate(passes):
        if one.name in names[:place]:
            return f"`{one.name}` is there twice"
        for earlier in one.after:
            if earlier in names[place:]:
                return f"`{one.name}` must come after `{earlier}`"
        for needed in one.needs:
            if needed not in names[:place]:
                return f"`{one.name}` needs `{needed}` before it"
    return None


def _record(one: Pass, before: ExportedProgram, result: Rewritten, seconds: float) -> PassRecord:
    old, new = census(before), census(result.program)
    return PassRecord(
        spec=str(one),
        modified=result.modified,
        ops_before=old.total(),
        ops_after=new.total(),
        removed=_ranked(old - new),
        added=_ranked(new - old),
        declined=result.declined,
        seconds=round(seconds, 3),
    )


def _ranked(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def pipeline_of(specs: Sequence[str]) -> Pipeline:
    """Of passes as recipes and manifests write them, `name{option=value}` each; UsageError for what is none."""
    return Pipeline(parse(", ".join(specs)))
