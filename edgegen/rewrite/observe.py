"""What watches a pipeline run: a dump of every graph, and numbers held against those of the graph before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from edgegen.errors import EdgegenError, GateError
from edgegen.graph.edit import user_inputs
from edgegen.graph.evaluate import evaluate
from edgegen.graph.text import graph_text
from edgegen.rewrite.base import Pass, PassError, Rewritten


class PassMismatch(PassError, GateError):
    """A pass gave numbers beyond its tolerance: a gate that was not met, exit code 3."""


class Dump:
    """Writes the graph before the first pass as `00-input.txt` and after pass N, when it changed it, as `NN-name.txt`.

    So the graph before a pass is the file of the highest number below its own. Files of an earlier run stay: an own
    folder for each run keeps them apart. EdgegenError when the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = 0

    def __call__(self, one: Pass, before: ExportedProgram, result: Rewritten) -> None:
        if self._seen == 0:
            self._write("00-input.txt", before)
        self._seen += 1
        if result.modified:
            self._write(f"{self._seen:02d}-{one.name}.txt", result.program)

    def _write(self, name: str, program: ExportedProgram) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_text(graph_text(program), encoding="utf-8")
        except OSError as error:
            raise EdgegenError(f"`{self._folder / name}` cannot be written: {error.strerror}") from error


class Verify:
    """Runs the graph before and after each pass that changed it, and raises PassMismatch beyond the pass's tolerance.

    `inputs` are those of the first graph by placeholder name; a pass that changes the signature says through
    `Pass.equivalent_inputs` at which inputs both graphs agree. `errors` has the worst relative error of each pass,
    `program` and `inputs` the last graph that held and its inputs, `seen` how many passes did.
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self.inputs: dict[str, Tensor] = dict(inputs)
        self.program: ExportedProgram | None = None
        self.errors: dict[str, float] = {}
        self.seen = 0

    def __call__(self, one: Pass, before: ExportedProgram, result: Rewritten) -> None:
        if self.program is None:
            self.program = before
        if result.modified:
            given, renamed = one.equivalent_inputs(self.inputs)
            self.errors[one.name] = hold(one, before, given, result.program, renamed)
            self.inputs = renamed
        self.program = result.program
        self.seen += 1


def hold(
    one: Pass,
    before: ExportedProgram,
    given: Mapping[str, Tensor],
    after: ExportedProgram,
    renamed: Mapping[str, Tensor],
) -> float:
    """The worst relative error over the outputs; PassMismatch names the worst one when it is beyond `one.tolerance`."""
    if missing := [node.name for node in user_inputs(after) if node.name not in renamed]:
        raise PassError(f"pass `{one}` made the input `{missing[0]}` and gives no `equivalent_inputs` for it")
    expected, found = evaluate(before, given), evaluate(after, renamed)
    names = [spec.arg.name for spec in after.graph_signature.output_specs]
    errors = [relative_error(a, b) for a, b in zip(expected, found, strict=True)]
    worst = max(range(len(errors)), key=lambda place: errors[place])
    if not errors[worst] <= one.tolerance:
        raise PassMismatch(
            f"pass `{one}` changed output {worst} (`{names[worst]}`) by {errors[worst]:.3g} relative, "
            f"and promises {one.tolerance:.3g}"
        )
    return errors[worst]


def relative_error(expected: Tensor, found: Tensor) -> float:
    """max |a - b| / max |a|; 0 for the same bits, inf for another shape or dtype, NaN or infinity."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if torch.equal(expected, found):
        return 0.0
    if not torch.isfinite(expected).all() or not torch.isfinite(found).all():
        return float("inf")
    a, b = expected.double(), found.double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
