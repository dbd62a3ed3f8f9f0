"""Join the components of a backend into one package with a function each: a step with a cache entry of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgegen.build.lowering import (
    JoinedComponents,
    LoweredComponent,
    LowerFailure,
    compiler_fingerprint,
    tool_versions,
)
from edgegen.build.recipe import BackendRecipe
from edgegen.cache import Cache
from edgegen.child import run_child
from edgegen.errors import EdgegenError
from edgegen.lower.backend import get_backend
from edgegen.lower.coreml_functions import Joined, JoinInChild, Part

PACKAGE = "model.mlpackage"
_MODULE = "edgegen.lower.coreml_functions"


def join_components(
    backend: BackendRecipe, results: Sequence[LoweredComponent | LowerFailure], cache: Cache, log_dir: Path
) -> list[LoweredComponent | LowerFailure]:
    """`results` (of a whole build) with those of `backend` joined, in the order in which the components run.

    Where one of them could not be lowered all stay as they are. A package that cannot be made is a failure of the first
    component, and what was lowered is kept beside it.
    """
    mine = [one for one in results if one.job.backend == backend.name]
    parts = [one for one in mine if isinstance(one, LoweredComponent)]
    if not parts or len(parts) != len(mine):
        return list(results)
    log = log_dir / f"{backend.name}-join.log"
    try:
        joined = _joined(backend, parts, cache, log)
    except EdgegenError as error:
        return [*results, LowerFailure(parts[0].job, error, log)]
    return [replace(one, joined=joined) if one in parts else one for one in results]


def _joined(backend: BackendRecipe, parts: Sequence[LoweredComponent], cache: Cache, log: Path) -> JoinedComponents:
    functions = backend.functions
    key = cache.key(
        "join",
        # A lowered component's key says everything that made it.
        parts=[[functions[one.job.component.name], one.entry.name] for one in parts],
        versions=tool_versions(get_backend(backend.name)),
        compiler=compiler_fingerprint(),
    )

    def build(entry: Path) -> None:
        (entry / "artifact").mkdir()
        job = JoinInChild(
            parts=tuple(Part(function=functions[one.job.component.name], package=one.own_path) for one in parts),
            package=entry / "artifact" / PACKAGE,
        )
        run_child(_MODULE, job, Joined, log, f"one package for backend `{backend.name}`", parent_folder=entry)
        shutil.copyfile(log, entry / "log.txt")

    entry = cache.directory(key, build)
    return JoinedComponents(entry / "artifact" / PACKAGE, functions, entry / "log.txt")
