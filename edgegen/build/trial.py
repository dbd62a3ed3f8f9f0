"""One graph, one backend: lower it, execute it, and hold it against the graph itself; what `--shrink` asks again and
again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.export import ExportedProgram

from edgegen.errors import EdgegenError
from edgegen.graph.capture import signature
from edgegen.graph.evaluate import evaluate
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest, Precision, get_backend
from edgegen.lower.worker import lower_in_child
from edgegen.rewrite.reduce import Fails, reduce, save
from edgegen.rewrite.to_half import ToHalf
from edgegen.verify.metrics import sqnr_db

MOST_CALLS, MOST_SECONDS = 60, 900.0


@dataclass(frozen=True)
class Trial:
    """Which backend, at which precision, with the options of its target."""

    backend: str
    precision: Precision
    options: Mapping[str, str]

    def sqnr_db(self, program: ExportedProgram, inputs: Mapping[str, Tensor]) -> float:
        """Lowest over the outputs, against `program` in torch. EdgegenError when it cannot be lowered, loaded or run.

        A float32 `program` is cast to float16 first where the backend wants that.
        """
        backend = get_backend(self.backend)
        reason = backend.not_executed_here()
        if reason is not None:
            raise EdgegenError(f"`{self.backend}` is not executed here: {reason}")
        specs = signature(program)
        expected = [value.numpy() for value in evaluate(program, inputs)]
        outputs = tuple(_output(f"output_{place}", value) for place, value in enumerate(expected))
        half = self.precision == "fp16" and backend.half == "graph"
        lowered_from = ToHalf()(program).program if half else program
        with tempfile.TemporaryDirectory(prefix="edgegen-trial-") as folder:
            out = Path(folder) / "artifact"
            request = LowerRequest("trial", specs, outputs, self.precision, out, self.options)
            lowered = lower_in_child(self.backend, lowered_from, request, Path(folder) / "log.txt")
            executable = backend.load(out / lowered.file, specs, outputs)
            try:
                found = executable({spec.name: inputs[spec.name].numpy() for spec in specs})
                pairs = [(value, found[spec.name]) for spec, value in zip(outputs, expected, strict=True)]
                return min(sqnr_db(a, np.asarray(b)) for a, b in pairs)
            finally:
                executable.close()


def shrink_parity(
    trial: Trial,
    program: ExportedProgram,
    inputs: Mapping[str, Tensor],
    gate_db: float,
    folder: Path,
    told: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the smallest graph that `trial` gets wrong (below `gate_db`, or not at all) to `folder`; the script's path.

    EdgegenError when the whole graph does not fail on its own: then the failure is not that of one component.
    """
    reduced = reduce(
        program, inputs, _fails(trial, gate_db), most_calls=MOST_CALLS, most_seconds=MOST_SECONDS, progress=told
    )
    return save(reduced, folder, "none", lower=f"{trial.backend}:{trial.precision}")


def _fails(trial: Trial, gate_db: float) -> Fails:
    """The failure of the first program that is asked about, and no other: wrong numbers, or an error of one kind."""
    first: list[str] = []

    def fails(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> bool:
        try:
            how = "" if trial.sqnr_db(program, inputs) >= gate_db else "wrong numbers"
        except EdgegenError as error:
            how = type(error.__cause__ or error).__name__
        if not first:
            first.append(how)
        return bool(how) and how == first[0]

    return fails


def _output(name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "shape": value.shape, "dtype": value.dtype.name})
