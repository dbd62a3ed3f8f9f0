"""Numbers beside those that the gates are about, from the evaluator of a backend that has one. Imports no torch itself.

- Where the runtime itself executed the artifacts (Core ML on macOS), the evaluator is held against it: two programs
  that were written apart and agree are right about the file.
- Where sums in float16 were asked for, the evaluator computes the artifacts once more with them: a model of the risk on
  a unit that accumulates in float16, not of a chip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgegen.errors import EdgegenError
from edgegen.lower.backend import Array, Backend, Executable
from edgegen.lower.stand_in import Evaluated, Sums
from edgegen.verify.metrics import sqnr_db
from edgegen.verify.outcome import AlsoMeasured, ComponentParity, ParityReport
from edgegen.verify.parity import ArtifactError, call
from edgegen.verify.trajectory import Reference, Sample, Signature

AGAINST_EVALUATOR = "the runtime's outputs against those of edgegen's reference evaluator"
HALF_SUMS = "with sums kept in float16, by edgegen's reference evaluator"


def with_second_opinions(
    report: ParityReport,
    backend: Backend,
    artifacts: Mapping[str, Path],
    executables: Mapping[str, Executable],
    reference: Reference,
    accumulate: Sums,
) -> ParityReport:
    """`report` with what the backend's evaluator says of each component that was executed, over one picture's calls.

    `artifacts` are single files or packages: nothing is said of a component in parts or tiles.
    """
    if not isinstance(backend, Evaluated):
        return report
    runtime_is_here = backend.executed_by() is None
    missing = backend.evaluator_missing()
    samples = reference.one_picture()

    def more(part: ComponentParity) -> ComponentParity:
        executable = executables.get(part.component)
        if executable is None or part.sqnr_db is None or part.component not in artifacts:
            return part
        path, signature = artifacts[part.component], reference.signatures[part.component]
        calls = samples[part.component]
        found = []
        if runtime_is_here:
            if missing:
                text = f"not compared with edgegen's reference evaluator: {', '.join(missing)} not installed"
                found.append(AlsoMeasured(what=text, sqnr_db=None))
            else:
                found.append(_against(backend, path, signature, calls, executable))
        if accumulate == "fp16" and not missing:
            found.append(_half_sums(backend, path, signature, calls))
        return part.model_copy(update={"also": tuple(found)})

    return report.model_copy(update={"components": tuple(more(part) for part in report.components)})


def _against(
    backend: Evaluated, path: Path, signature: Signature, samples: Sequence[Sample], executable: Executable
) -> AlsoMeasured:
    def expected(sample: Sample) -> Mapping[str, Array]:
        return call(executable, signature, sample.inputs)

    return _worst(AGAINST_EVALUATOR, backend, path, signature, samples, "fp32", expected)


def _half_sums(backend: Evaluated, path: Path, signature: Signature, samples: Sequence[Sample]) -> AlsoMeasured:
    return _worst(HALF_SUMS, backend, path, signature, samples, "fp16", lambda sample: sample.outputs)


def _worst(
    what: str,
    backend: Evaluated,
    path: Path,
    signature: Signature,
    samples: Sequence[Sample],
    accumulate: Sums,
    expected: Callable[[Sample], Mapping[str, Array]],
) -> AlsoMeasured:
    """The lowest SQNR of the evaluator's outputs; a comparison that cannot be made says so and hides nothing else."""
    try:
        evaluator = backend.evaluator(path, signature.inputs, signature.outputs, accumulate=accumulate)
        try:
            scores = []
            for sample in samples:
                out, wanted = call(evaluator, signature, sample.inputs), expected(sample)
                scores.append((min(sqnr_db(wanted[name], out[name]) for name in wanted), sample.label))
        finally:
            evaluator.close()
    except (ArtifactError, EdgegenError, ValueError) as error:
        return AlsoMeasured(what=f"{what}: could not be compared: {' '.join(str(error).split())[:300]}", sqnr_db=None)
    lowest, label = min(scores)
    return AlsoMeasured(what=what, sqnr_db=lowest, worst_at=label)
