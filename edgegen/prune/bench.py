"""Kernels timed on this machine's runtime, in a child process that lowers each and calls it: one file a point.

What is timed is what a build would run: the passes of the target's preset come first.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from edgegen.cache import Cache
from edgegen.child import child_main, leave, run_child
from edgegen.lower.backend import get_backend
from edgegen.precision.options import Progress
from edgegen.profile.host import this_host
from edgegen.prune.kernels import COPIES, Kernel

ROUNDS, SECONDS, FEWEST = 3, 0.04, 8
"""How often each point has its turn, how long that is, and how many calls at least."""
AT_ONCE = 24
"""Points that one child times: what is cached outlives one that is stopped."""
METHOD = 1
"""Raised when points are timed in another way, so that nobody reads old ones."""


class Point(BaseModel):
    """A kernel at widths of what it reads and writes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: Kernel
    read: int
    written: int


class Job(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    points: tuple[Point, ...]


class Times(BaseModel):
    """Milliseconds of one kernel at each point: of the quickest call, which other work on the machine moves least."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    milliseconds: tuple[float, ...]


def times(backend: str, points: Sequence[Point], cache: Cache, progress: Progress) -> dict[Point, float]:
    """Milliseconds of each point on this host's runtime of `backend`; what `cache` has not is measured.

    EdgegenError when a point cannot be lowered or run.
    """
    keys = {point: cache.key("kernel-time", method=METHOD, **_conditions(backend), **_plain(point)) for point in points}
    found: dict[Point, float] = {}
    missing = []
    for point, key in keys.items():
        known = _known(cache, key)
        if known is None:
            missing.append(point)
        else:
            found[point] = known
    if missing:
        progress.stage(f"time kernels with {backend} on this machine", len(missing))
    for start in range(0, len(missing), AT_ONCE):
        part = tuple(missing[start : start + AT_ONCE])
        with tempfile.TemporaryDirectory(prefix="edgegen-bench-") as folder:
            made = run_child(
                "edgegen.prune.bench",
                Job(backend=backend, points=part),
                Times,
                Path(folder) / "log.txt",
                f"timing kernels with `{backend}`",
            )
        for point, value in zip(part, made.milliseconds, strict=True):
            _keep(cache, keys[point], value)
            found[point] = value
            progress.advance()
    return found


def _plain(point: Point) -> dict[str, object]:
    return {
        "kind": point.kernel.kind,
        "sizes": list(point.kernel.sizes),
        "read": point.read,
        "written": point.written,
    }


def _conditions(backend: str) -> Mapping[str, object]:
    """What a time is of: machine, runtime, versions."""
    host = this_host()
    versions = {}
    for name in ("torch", *get_backend(backend).distributions):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"backend": backend, "cpu": host.cpu, "cpus": host.cpus_usable, "os": host.os, "versions": versions}


class _Missing(Exception):
    """An entry is only looked for."""


def _known(cache: Cache, key: str) -> float | None:
    def build(folder: Path) -> None:
        raise _Missing

    try:
        entry = cache.directory(key, build)
    except _Missing:
        return None
    return float(json.loads((entry / "time.json").read_text()))


def _keep(cache: Cache, key: str, value: float) -> None:
    def build(folder: Path) -> None:
        (folder / "time.json").write_text(json.dumps(value))

    cache.directory(key, build)


def work(job: Job) -> Times:
    """The child's whole task: every artifact is made, then all are called in turns, round after round, so that what
    disturbs the machine for a while does not fall on one point alone."""
    empty = Point(kernel=Kernel(kind="pointwise", sizes=(1,)), read=8, written=8)
    calls = [_call(job.backend, point) for point in (empty, *job.points)]
    taken = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for index, call in enumerate(calls):
            taken[index] = min(taken[index], _quickest(call))
    beside, *each = taken
    return Times(milliseconds=tuple(max(1e-5, (one - beside) / COPIES) for one in each))


def _quickest(call: Callable[[], object]) -> float:
    """Milliseconds."""
    for _ in range(3):
        call()
    best, count, end = float("inf"), 0, time.perf_counter() + SECONDS
    while count < FEWEST or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
        count += 1
    return best * 1e3


def _call(name: str, point: Point) -> Callable[[], object]:
    """One call of the loaded artifact with `COPIES` of the kernel."""
    import numpy as np
    import torch

    from edgegen.graph.capture import capture, signature
    from edgegen.graph.tensor_spec import TensorSpec
    from edgegen.lower.backend import LowerRequest
    from edgegen.lower.chain import load_artifact
    from edgegen.prune.kernels import network
    from edgegen.rewrite.choose import canonical_preset, shape_preset
    from edgegen.rewrite.pipeline import Pipeline
    from edgegen.students.student import Component

    torch.manual_seed(0)
    module, shape = network(point.kernel, point.read, point.written)
    module.eval().requires_grad_(False)
    given = TensorSpec(name="x", shape=shape)
    with torch.no_grad():
        out = TensorSpec(name="y", shape=tuple(module(torch.zeros(shape)).shape))
    program = capture(Component("model", module, (given,), (out,)))
    program, _ = Pipeline(canonical_preset("model", ())).run(program)
    program, _ = Pipeline(shape_preset(name)).run(program)
    backend, folder = get_backend(name), Path(tempfile.mkdtemp())
    lowered = backend.lower(program, LowerRequest("model", signature(program), (out,), "fp32", folder))
    loaded = load_artifact(backend, folder / lowered.file, signature(program), (out,))
    feed = {given.name: np.random.default_rng(0).normal(size=given.shape).astype(np.float32)}
    return lambda: loaded(feed)


if __name__ == "__main__":
    leave(child_main(sys.argv[1], Job, work))
