"""What takes long while a plan is made, kept by content: a changed planner never reuses what an older one found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache as memoize
from pathlib import Path
from typing import Any

import edgegen
from edgegen.cache import Cache
from edgegen.precision.repair.tensors import Tensors, load, save

_MADE, _TENSORS = "made.json", "made.safetensors"


@memoize
def planner_fingerprint() -> str:
    """sha256 over the sources that decide a plan."""
    root = Path(edgegen.__file__).parent
    digest = hashlib.sha256(edgegen.__version__.encode())
    for folder in ("graph", "precision", "rewrite", "students"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def kept(cache: Cache, stage: str, parts: dict[str, Any], make: Callable[[], Any]) -> Any:
    """`make()`, JSON values, from `cache` where it was made before of the same `parts`."""

    def build(folder: Path) -> None:
        (folder / _MADE).write_text(json.dumps(make()))

    entry = cache.directory(cache.key(stage, planner=planner_fingerprint(), **parts), build)
    return json.loads((entry / _MADE).read_text())


def kept_tensors(
    cache: Cache, stage: str, parts: dict[str, Any], make: Callable[[], tuple[Tensors, Any]]
) -> tuple[Tensors, Any]:
    """As `kept`, of tensors and JSON values."""

    def build(folder: Path) -> None:
        tensors, said = make()
        digest = save(folder / _TENSORS, tensors)
        (folder / _MADE).write_text(json.dumps([digest, said]))

    entry = cache.directory(cache.key(stage, planner=planner_fingerprint(), **parts), build)
    digest, said = json.loads((entry / _MADE).read_text())
    return load(entry / _TENSORS, digest), said
