"""Lower every component with every chosen backend: child processes, side by side, each result cached by content."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as memoize
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from joblib import Parallel, delayed
from torch.export import ExportedProgram

import edgegen
from edgegen.cache import Cache
from edgegen.errors import EdgegenError
from edgegen.graph.capture import capture
from edgegen.lower.backend import Backend, Lowered, LowerRequest, Precision, get_backend
from edgegen.lower.worker import lower_in_child
from edgegen.students.student import Component, Student

PARALLEL_LIMIT_BYTES = 1 << 30
"""Components with more weights than this are lowered one at a time: converters peak at several times the weights."""


@dataclass(frozen=True)
class LowerJob:
    """One component for one backend, with all that decides what comes out."""

    component: Component
    backend: str
    precision: Precision
    options: Mapping[str, str]


@dataclass(frozen=True)
class LoweredComponent:
    """`entry` is the cache's folder: `artifact/` with what the backend wrote, and `log.txt`."""

    job: LowerJob
    entry: Path
    lowered: Lowered

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
    for folder in ("graph", "lower"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


class Graphs:
    """Captured graphs of one student: each component is traced at most once per precision, and only when needed."""

    def __init__(self) -> None:
        self._captured: dict[tuple[str, bool], ExportedProgram] = {}
        self._lock = threading.Lock()  # torch.export keeps its state in globals

    def get(self, component: Component, *, half: bool) -> ExportedProgram:
        key = (component.fingerprint, half)
        with self._lock:
            if key not in self._captured:
                self._captured[key] = capture(component, half=half)
            return self._captured[key]


def lower_all(
    jobs: Sequence[LowerJob],
    student: Student,
    cache: Cache,
    log_dir: Path,
    done: Callable[[LowerJob], None],
) -> list[LoweredComponent | LowerFailure]:
    """Lower `jobs`, as many at once as cores and memory allow; results in the order of the jobs."""
    weights = sum(p.numel() * 4 for part in student.components.values() for p in part.module.parameters())
    workers = 1 if weights > PARALLEL_LIMIT_BYTES else min(len(jobs), os.cpu_count() or 1)
    graphs = Graphs()

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
        versions=tool_versions(backend),
        compiler=compiler_fingerprint(),
    )
    log = log_dir / f"{job.backend}-{job.component.name}.log"

    def build(entry: Path) -> None:
        program = graphs.get(job.component, half=job.precision == "fp16" and backend.half_graph)
        out_dir = entry / "artifact"
        out_dir.mkdir()
        request = LowerRequest(
            component=job.component.name,
            inputs=job.component.inputs,
            outputs=job.component.outputs,
            precision=job.precision,
            out_dir=out_dir,
            options=job.options,
        )
        lowered = lower_in_child(job.backend, program, request, log)
        (entry / "lowered.json").write_text(lowered.model_dump_json())
        shutil.copyfile(log, entry / "log.txt")

    try:
        entry = cache.directory(key, build)
    except EdgegenError as error:
        return LowerFailure(job, error, log)
    return LoweredComponent(job, entry, Lowered.model_validate_json((entry / "lowered.json").read_text()))
