"""The graph that an artifact was lowered from, made again from the student and the passes that were recorded."""

from __future__ import annotations

from collections.abc import Sequence

from torch.export import ExportedProgram

from edgegen.rewrite.registry import parse
from edgegen.rewrite.to_half import ToHalf


def rebuilt(captured: ExportedProgram, specs: Sequence[str]) -> ExportedProgram:
    """`captured` after the passes of `specs` (an artifact's `passes`), in float32: what the casts to float16 lose is
    what an artifact is held against, so they are left out. UsageError for a pass that this edgegen does not know."""
    program = captured
    for spec in specs:
        for one in parse(spec):
            if not isinstance(one, ToHalf):
                program = one(program).program
    return program
