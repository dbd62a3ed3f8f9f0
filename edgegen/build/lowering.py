"""Lower every component with every chosen backend: child processes, side by side, each result cached by content."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as memoize
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from joblib import Parallel, delayed
from pydantic import TypeAdapter

import edgegen
from edgegen.build.admission import SHARE, Admission
from edgegen.build.clock import Clock
from edgegen.build.graphs import Graphs, Rewriting
from edgegen.cache import Cache
from edgegen.errors import EdgegenError, GateError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Backend, Lowered, LowerRequest, Precision, get_backend
from edgegen.lower.chain import lower_chain
from edgegen.lower.mlpackage import function_path
from edgegen.lower.tflite_half import halve_in_child
from edgegen.lower.worker import lower_in_child, open_home
from edgegen.nursery import Home
from edgegen.precision.plan import ComponentPlan
from edgegen.precision.repair.tensors import Tensors, content
from edgegen.rewrite.forecast import Forecast
from edgegen.rewrite.half_hazards import Hazard
from edgegen.rewrite.pipeline import PassRecord, Pipeline
from edgegen.students.archive import available_memory
from edgegen.students.student import Component
from edgegen.verify.trajectory import Sample
from edgegen.verify.worker import PREDICTED

RECORDS = TypeAdapter(tuple[PassRecord, ...])
HAZARDS = TypeAdapter(tuple[Hazard, ...])
_SIGNATURE = TypeAdapter(tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]])
PEAKS = {"coreai": 8, "coreml": 4, "executorch": 4, "onnx": 3, "tflite": 6}
"""Backend -> how many times the fp32 weights its converter may take, with room to spare: docs/benchmarks/scale-*.md."""
BASE_BYTES = 1 << 30
"""What a converter takes for itself."""


@dataclass(frozen=True)
class LowerJob:
    """One component for one backend, with all that decides what comes out."""

    component: Component
    backend: str
    precision: Precision
    options: Mapping[str, str]
    canonical: Pipeline
    shape: Pipeline
    max_pieces: int | None = None
    """A graph that its delegate would cut into more pieces is not lowered; None asks for nothing."""
    samples: tuple[Sample, ...] = ()
    """Calls on the student's own trajectory: what fp16 is made safe on."""
    plan: ComponentPlan | None = None
    """What is compressed, and how; None: nothing."""
    repaired: Tensors = field(default_factory=dict)
    """What the plan's repairs changed in the canonical graph."""
    parts: int = 1
    """Into how many files it is cut, run one after another."""

    @property
    def planned(self) -> bool:
        """Whether a plan compresses any of it."""
        return self.plan is not None and self.plan.compressed

    @property
    def half(self) -> bool:
        """Whether float16 arithmetic comes out of this: fp16 that is only stored needs no care."""
        return self.precision == "fp16" and get_backend(self.backend).half != "storage"


@dataclass(frozen=True)
class JoinedComponents:
    """One package with a function for each component; `log` says how it was made."""

    package: Path
    functions: Mapping[str, str]
    """Component -> what its function is called."""
    log: Path


@dataclass(frozen=True)
class LoweredComponent:
    """`entry` is the cache's folder: `artifact/` with what the backend wrote, and `log.txt`."""

    job: LowerJob
    entry: Path
    lowered: Lowered
    records: tuple[PassRecord, ...]
    hazards: tuple[Hazard, ...]
    """What fp16 would have broken, and what was done about it."""
    forecast: Forecast
    """What the delegate was expected to do with the graph, before it was lowered."""
    joined: JoinedComponents | None = None
    """The package of several functions that holds this component too."""

    @property
    def own_path(self) -> Path:
        """What was lowered, for itself."""
        return self.entry / "artifact" / self.lowered.file

    @property
    def path(self) -> Path:
        """What goes into the bundle: a file or a package."""
        return self.own_path if self.joined is None else self.joined.package

    @property
    def folder(self) -> Path:
        """Where that lies: all of it belongs to the backend's folder of the bundle."""
        return self.entry / "artifact" if self.joined is None else self.joined.package.parent

    @property
    def function(self) -> str | None:
        """Which function of the package at `path`; None where that is this component and nothing else."""
        return None if self.joined is None else self.joined.functions[self.job.component.name]

    @property
    def loadable(self) -> Path:
        """What the backend is given to load what is in the bundle."""
        return self.path if self.function is None else function_path(self.path, self.function)

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
    return distributions("torch", *backend.distributions)


def distributions(*names: str) -> dict[str, str]:
    """Distribution -> its version, `missing` where it is not installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


NETWORKS = ("diffusers", "transformers")
"""Distributions whose code a component may run."""


@memoize
def compiler_fingerprint() -> str:
    """sha256 over the sources that decide an artifact's bytes: a changed compiler never reuses what an older one
    made."""
    root = Path(edgegen.__file__).parent
    digest = hashlib.sha256(edgegen.__version__.encode())
    # What a component computes is its weights and its network's own code, here or in diffusers: a graph is that code.
    digest.update(repr(sorted(distributions(*NETWORKS).items())).encode())
    paths = [root / "students/reduce.py"]
    for folder in ("graph", "lower", "precision", "rewrite", "students/networks"):
        paths += sorted((root / folder).rglob("*.py"))
    for path in paths:
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


class _Homes:
    """For each backend one process that has imported its converter, from when something is to be lowered with it."""

    def __init__(self) -> None:
        self._open: dict[str, Home | None] = {}
        self._lock = threading.Lock()

    def of(self, backend: str) -> Home | None:
        with self._lock:
            if backend not in self._open:
                self._open[backend] = open_home(backend)
            return self._open[backend]

    def close(self) -> None:
        for home in self._open.values():
            if home is not None:
                home.close()


def lower_all(
    jobs: Sequence[LowerJob],
    graphs: Graphs,
    cache: Cache,
    log_dir: Path,
    done: Callable[[LowerJob], None],
    clock: Clock | None = None,
) -> list[LoweredComponent | LowerFailure]:
    """Lower `jobs`, as many at once as cores and memory allow; results in the order of the jobs."""
    clock = clock or Clock()
    # One more than there are cores: now and then one waits for the disk, or for the graph that another rewrites.
    workers = min(len(jobs), (os.cpu_count() or 1) + 1)
    free = available_memory()
    admission = Admission(None if free is None else int(SHARE * free))

    needs = [BASE_BYTES + PEAKS[job.backend] * weight_bytes(job.component) for job in jobs]

    homes = _Homes()

    def run(place: int) -> LoweredComponent | LowerFailure:
        with admission.room_for(needs[place]), clock.span(f"{_name(jobs[place])}: whole"):
            result = _lower_one(jobs[place], graphs, cache, log_dir, clock, homes)
        done(jobs[place])
        return result

    # The largest go first, so that none is left over at the end; but those whose graph is computed in float16 first, on
    # all cores and with nobody else rewriting, when others have something to convert. Threads only wait: the work is in
    # child processes.
    order = sorted(range(len(jobs)), key=lambda place: (jobs[place].half, -needs[place]))
    try:
        made: list[LoweredComponent | LowerFailure] = Parallel(n_jobs=max(1, workers), backend="threading")(
            delayed(run)(place) for place in order
        )
    finally:
        homes.close()
    results = dict(zip(order, made, strict=True))
    return [results[place] for place in range(len(jobs))]


def weight_bytes(component: Component) -> int:
    """Of its parameters, in fp32."""
    return sum(4 * parameter.numel() for parameter in component.module.parameters())


def _name(job: LowerJob) -> str:
    return f"{job.backend}-{job.component.name}"


def _lower_one(
    job: LowerJob, graphs: Graphs, cache: Cache, log_dir: Path, clock: Clock, homes: _Homes
) -> LoweredComponent | LowerFailure:
    log = log_dir / f"{_name(job)}.log"

    def build(entry: Path) -> None:
        if (made := _float_entry(job, cache)) is not None:
            with clock.span(f"{_name(job)}: cast"):
                _halve(job, made, entry, log, homes)
            return
        home = homes.of(job.backend)  # it imports while the graph is rewritten
        with clock.span(f"{_name(job)}: rewrite"):
            rewriting = rewritten(job, graphs)
        with clock.span(f"{_name(job)}: forecast"):
            foreseen = graphs.forecast(rewriting, job.backend)
        _require_pieces(job, foreseen)
        out_dir = entry / "artifact"
        out_dir.mkdir()
        request = LowerRequest(
            component=job.component.name,
            inputs=rewriting.signature.inputs,
            outputs=rewriting.signature.outputs,
            precision=job.precision,
            out_dir=out_dir,
            options=job.options,
            islands=rewriting.islands,
            quantized=rewriting.quantized,
        )
        with clock.span(f"{_name(job)}: convert"):
            if job.parts == 1:
                lowered = lower_in_child(job.backend, rewriting.program, request, log, home=home)
            else:
                lowered = lower_chain(job.backend, rewriting.program, request, log, job.parts, home)
        # Codes that round the other way outweigh what float16 does between them: the plan's own bounds judge those.
        integers = any(one.precision.startswith("w8a8") for one in rewriting.quantized.values())
        if rewriting.half_db is not None and math.isfinite(rewriting.half_db) and not integers:
            details = {**lowered.details, PREDICTED: f"{rewriting.half_db:.2f}"}
            lowered = lowered.model_copy(update={"details": details})
        (entry / "lowered.json").write_text(lowered.model_dump_json())
        (entry / "signature.json").write_bytes(_SIGNATURE.dump_json((request.inputs, request.outputs)))
        (entry / "passes.json").write_bytes(RECORDS.dump_json(rewriting.records))
        (entry / "hazards.json").write_bytes(HAZARDS.dump_json(rewriting.hazards))
        (entry / "forecast.json").write_text(foreseen.model_dump_json())
        shutil.copyfile(log, entry / "log.txt")

    try:
        entry = cache.directory(_key(job, cache), build)
        foreseen = Forecast.model_validate_json((entry / "forecast.json").read_text())
        _require_pieces(job, foreseen)
    except EdgegenError as error:
        return LowerFailure(job, error, log)
    lowered = Lowered.model_validate_json((entry / "lowered.json").read_text())
    records = RECORDS.validate_json((entry / "passes.json").read_bytes())
    hazards = HAZARDS.validate_json((entry / "hazards.json").read_bytes())
    return LoweredComponent(job, entry, lowered, records, hazards, foreseen)


def was_lowered(job: LowerJob, cache: Cache) -> bool:
    """Whether the cache seems to have what `job` makes: a look at a name, not at what is there."""
    return cache.has(_key(job, cache))


def _key(job: LowerJob, cache: Cache) -> str:
    return cache.key(
        "lower",
        component=job.component.fingerprint,
        backend=job.backend,
        precision=job.precision,
        options=dict(sorted(job.options.items())),
        passes=f"{job.canonical}; {job.shape}",
        plan=None if job.plan is None else job.plan.model_dump(mode="json"),
        repaired=content(job.repaired),
        parts=job.parts,
        versions=tool_versions(get_backend(job.backend)),
        compiler=compiler_fingerprint(),
    )


def _float_entry(job: LowerJob, cache: Cache) -> Path | None:
    """What was made of the same graph in fp32, where fp16 is a cast of that; None where it is not, or is not there."""
    storage = job.backend == "tflite" and job.precision == "fp16" and job.plan is None and job.parts == 1
    return cache.find(_key(replace(job, precision="fp32"), cache)) if storage else None


def _halve(job: LowerJob, made: Path, entry: Path, log: Path, homes: _Homes) -> None:
    """Fill `entry` from the fp32 entry `made`: the graph and all that is known of it are the same."""
    inputs, outputs = _SIGNATURE.validate_json((made / "signature.json").read_bytes())
    _require_pieces(job, Forecast.model_validate_json((made / "forecast.json").read_text()))
    (entry / "artifact").mkdir()
    request = LowerRequest(job.component.name, inputs, outputs, "fp16", entry / "artifact")
    source = made / "artifact" / Lowered.model_validate_json((made / "lowered.json").read_text()).file
    lowered = halve_in_child(source, request, log, homes.of(job.backend))
    (entry / "lowered.json").write_text(lowered.model_dump_json())
    for name in ("signature.json", "passes.json", "hazards.json", "forecast.json"):
        shutil.copyfile(made / name, entry / name)
    shutil.copyfile(log, entry / "log.txt")


def rewritten(job: LowerJob, graphs: Graphs) -> Rewriting:
    """The graph that the backend of `job` is given."""
    backend = get_backend(job.backend)
    cast = backend.half == "graph"
    if job.plan is not None and job.planned:
        return graphs.planned(
            job.component,
            job.canonical,
            job.shape,
            job.plan,
            job.repaired,
            job.samples,
            half=("cast" if cast else "safe") if job.half else None,
            quantizes=backend.quantizes,
        )
    if job.half:
        return graphs.half(job.component, job.canonical, job.shape, job.samples, cast=cast)
    return graphs.shaped(job.component, job.canonical, job.shape)


def _require_pieces(job: LowerJob, foreseen: Forecast) -> None:
    """GateError, before anything is lowered, for a graph that would be cut into more pieces than allowed."""
    if job.max_pieces is None or foreseen.pieces is None or foreseen.pieces <= job.max_pieces:
        return
    cuts = Counter((one.op, one.reason) for one in foreseen.outside if one.cuts)
    lines = [
        f"`{job.component.name}` would be cut into {foreseen.pieces} pieces by {foreseen.delegate}, "
        f"{job.max_pieces} allowed"
    ]
    lines += [f"    {op} x{count}: {reason}" for (op, reason), count in cuts.most_common(8)]
    raise GateError("\n".join(lines))
