"""Lower every component with every chosen backend: child processes, side by side, each result cached by content."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as memoize
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from joblib import Parallel, delayed
from pydantic import TypeAdapter

import edgegen
from edgegen.build.graphs import Graphs
from edgegen.cache import Cache
from edgegen.errors import EdgegenError
from edgegen.lower.backend import Backend, Lowered, LowerRequest, Precision, get_backend
from edgegen.lower.worker import lower_in_child
from edgegen.rewrite.pipeline import PassRecord, Pipeline
from edgegen.students.student import Component, Student

RECORDS = TypeAdapter(tuple[PassRecord, ...])
PARALLEL_LIMIT_BYTES = 1 << 30
"""Components with more weights than this are lowered one at a time: converters peak at several times the weights."""


@dataclass(frozen=True)
class LowerJob:
    """One component for one backend, with all that decides what comes out."""

    component: Component
    backend: str
    precision: Precision
    options: Mapping[str, str]
    canonical: Pipeline
    shape: Pipeline


@dataclass(frozen=True)
class LoweredComponent:
    """`entry` is the cache's folder: `artifact/` with what the backend wrote, and `log.txt`."""

    job: LowerJob
    entry: Path
    lowered: Lowered
    records: tuple[PassRecord, ...]

    @property
    def path(self) -> Path:
        return self.entry / "artifact" / self.lowered.file

    @property
    def log(self) -> Path:
        return self.entry / "log.txt"


@dataclass(frozen=True)
class LowerFailure:
    """A component that a backend could not lower; the build goes on with the others and does not succeed."""

    job: LowerJob
    error: EdgegenError
    log: Path


def tool_versions(backend: Backend) -> dict[str, str]:
    """Versions of every distribution that shapes what the backend writes; an absent one is `missing`."""
    found = {"torch": version("torch")}
    for name in backend.distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


@memoize
def compiler_fingerprint() -> str:
    """sha256 over the sources that decide an artifact's bytes: a changed compiler never reuses what an older one
    made."""
    root = Path(edgegen.__file__).parent
    digest = hashlib.sha256(edgegen.__version__.encode())
    for folder in ("graph", "lower", "rewrite"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def lower_all(
    jobs: Sequence[LowerJob],
    student: Student,
    graphs: Graphs,
    cache: Cache,
    log_dir: Path,
    done: Callable[[LowerJob], None],
) -> list[LoweredComponent | LowerFailure]:
    """Lower `jobs`, as many at once as cores and memory allow; results in the order of the jobs."""
    weights = sum(p.numel() * 4 for part in student.components.values() for p in part.module.parameters())
    workers = 1 if weights > PARALLEL_LIMIT_BYTES else min(len(jobs), os.cpu_count() or 1)

    def run(job: LowerJob) -> LoweredComponent | LowerFailure:
        result = _lower_one(job, graphs, cache, log_dir)
        done(job)
        return result

    # Threads only wait here: the work is in the child processes.
    results: list[LoweredComponent | LowerFailure] = Parallel(n_jobs=max(1, workers), backend="threading")(
        delayed(run)(job) for job in jobs
    )
    return results


def _lower_one(job: LowerJob, graphs: Graphs, cache: Cache, log_dir: Path) -> LoweredComponent | LowerFailure:
    backend = get_backend(job.backend)
    key = cache.key(
        "lower",
        component=job.component.fingerprint,
        backend=job.backend,
        precision=job.precision,
        options=dict(sorted(job.options.items())),
        passes=f"{job.canonical}; {job.shape}",
        versions=tool_versions(backend),
        compiler=compiler_fingerprint(),
    )
    log = log_dir / f"{job.backend}-{job.component.name}.log"

    def build(entry: Path) -> None:
        rewriting = graphs.shaped(job.component, job.canonical, job.shape)
        out_dir = entry / "artifact"
        out_dir.mkdir()
        request = LowerRequest(
            component=job.component.name,
            inputs=rewriting.signature.inputs,
            outputs=rewriting.signature.outputs,
            precision=job.precision,
            out_dir=out_dir,
            options=job.options,
        )
        lowered = lower_in_child(job.backend, rewriting.program, request, log)
        (entry / "lowered.json").write_text(lowered.model_dump_json())
        (entry / "passes.json").write_bytes(RECORDS.dump_json(rewriting.records))
        shutil.copyfile(log, entry / "log.txt")

    try:
        entry = cache.directory(key, build)
    except EdgegenError as error:
        return LowerFailure(job, error, log)
    lowered = Lowered.model_validate_json((entry / "lowered.json").read_text())
    return LoweredComponent(job, entry, lowered, RECORDS.validate_json((entry / "passes.json").read_bytes()))
