"""Opening a bundle: nothing in it is believed before it has been checked. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgegen.bundle.manifest import SCHEMA_VERSION, Artifact, Manifest
from edgegen.errors import EdgegenError, UnsafeError, UsageError
from edgegen.lower.mlpackage import SUFFIX, function_path

MANIFEST = "manifest.json"
UNLISTED = ("reports/", "report.html")
"""What a bundle holds and the manifest does not list, beside the manifest itself."""

MANIFEST_LIMIT_BYTES = 16 * 2**20
TENSOR_LIMIT = 2**28
"""Elements of one tensor that an app is asked to allocate; 2**28 floats are 1 GiB."""
STEPS_LIMIT = 1000
_REBUILD = "build the bundle again, or fetch it again"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest and files have been checked. `extra_files` are not the bundle's; nothing uses them."""

    root: Path
    manifest: Manifest
    extra_files: tuple[str, ...] = ()

    def path(self, name: str) -> Path:
        """The file or folder that the manifest calls `name`."""
        return self.root / relative_path(name)

    def loadable(self, artifact: Artifact) -> Path:
        """What a backend is given to load `artifact`: its path, or that of its function in the package there."""
        path = self.path(artifact.path)
        return path if artifact.function is None else function_path(path, artifact.function)

    def artifacts(self, backend: str) -> dict[str, Artifact]:
        """What `backend` made, by component."""
        return {one.component: one for one in self.manifest.artifacts if one.backend == backend}

    def backends(self) -> tuple[str, ...]:
        """Backends that have every component here, the target's preferred ones first."""
        present = [*self.manifest.backends, *(one.backend for one in self.manifest.artifacts)]
        return tuple(
            name for name in dict.fromkeys(present) if set(self.artifacts(name)) == set(self.manifest.components)
        )


def open_bundle(path: Path, *, check_hashes: bool = True) -> Bundle:
    """Check the manifest and every file of the bundle at `path`.

    UsageError when there is no bundle; EdgegenError when it is of a newer schema, damaged or incomplete (the files are
    named); UnsafeError when a path leaves the folder or a link or device is in it. `check_hashes` False trusts the
    bytes and still checks that each file is there with its size.
    """
    if not path.is_dir():
        what = "is a file, not a bundle" if path.exists() else "does not exist"
        raise UsageError(f"bundle `{path}` {what}", hint="name a folder that `edgegen build` wrote")
    manifest = read_manifest(path)
    extra = check_contents(path, manifest, hashes=check_hashes)
    packages = tuple(f"{one.path}/" for one in manifest.artifacts)
    inside = [name for name in extra if name.startswith(packages)]
    if inside:
        raise EdgegenError(f"bundle `{path}` holds {_named(inside)} that its manifest does not list", hint=_REBUILD)
    return Bundle(path, manifest, tuple(extra))


def relative_path(name: str) -> str:
    """`name` itself when it is a plain relative POSIX path; UnsafeError when it could leave the folder."""
    parts = name.split("/")
    odd = any(ord(character) < 32 or character in "\\:\x7f" for character in name)
    if odd or len(name) > 1024 or any(part in ("", ".", "..") for part in parts):
        raise UnsafeError(f"path {name[:200]!r} is no plain path inside the bundle", hint=_REBUILD)
    return name


def read_manifest(root: Path) -> Manifest:
    """Parse `root`/manifest.json and check what it says against itself; touches no other file."""
    path = root / MANIFEST
    try:
        state = path.lstat()
    except FileNotFoundError as error:
        raise UsageError(
            f"`{root}` has no {MANIFEST}, so it is no bundle", hint="name a folder that `edgegen build` wrote"
        ) from error
    except OSError as error:
        raise EdgegenError(f"`{path}` cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(state.st_mode):
        raise UnsafeError(f"`{path}` is no regular file", hint=_REBUILD)
    if state.st_size > MANIFEST_LIMIT_BYTES:
        raise UnsafeError(f"`{path}` has {state.st_size} bytes, no manifest has more than {MANIFEST_LIMIT_BYTES}")
    try:
        document = json.loads(path.read_bytes(), object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except RecursionError as error:
        raise UnsafeError(f"`{path}` is nested too deeply to be a manifest") from error
    except (ValueError, OSError) as error:
        raise EdgegenError(f"`{path}` cannot be read: {error}", hint=_REBUILD) from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise EdgegenError(
            f"`{path}` has schema version {version}, this edgegen reads {SCHEMA_VERSION}",
            hint="pip install --upgrade edgegen",
        )
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200] or "the top"
        raise EdgegenError(f"`{path}` is no manifest: at `{where}`: {first['msg'][:200]}", hint=_REBUILD) from error
    except RecursionError as error:
        raise UnsafeError(f"`{path}` is nested too deeply to be a manifest") from error
    _check_paths(manifest)
    _check_numbers(manifest)
    return manifest


def check_contents(root: Path, manifest: Manifest, *, hashes: bool, complete: bool = True) -> list[str]:
    """Hold the files below `root` against the manifest; gives the files that are there and belong to nobody.

    `complete` False asks only for those extra files.
    """
    there = dict(_walk(root))
    extra = [name for name in there if name not in manifest.files and name != MANIFEST and not _unlisted(name)]
    if not complete:
        return extra
    missing = [name for name in manifest.files if name not in there]
    if missing:
        raise EdgegenError(f"bundle `{root}` lacks {_named(missing)}", hint=_REBUILD)
    wrong = [name for name, entry in manifest.files.items() if there[name] != entry.bytes]
    if hashes and not wrong:
        wrong = [name for name, entry in manifest.files.items() if _sha256(root / name) != entry.sha256]
    if wrong:
        raise EdgegenError(f"bundle `{root}` is damaged: {_named(wrong)} changed since it was built", hint=_REBUILD)
    return extra


def _unlisted(name: str) -> bool:
    return name == "report.html" or name.startswith("reports/")


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Every file below `root` as (POSIX path, size), sorted; UnsafeError for anything but files and folders."""
    folders = [""]
    while folders:
        at = folders.pop()
        try:
            entries = sorted(os.scandir(root / at), key=lambda entry: entry.name)
        except OSError as error:
            raise EdgegenError(f"`{root / at}` cannot be read: {error.strerror}") from error
        for entry in entries:
            name = f"{at}{entry.name}"
            if entry.is_symlink():
                raise UnsafeError(f"`{root / name}` is a link; a bundle holds none", hint=_REBUILD)
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name, entry.stat(follow_symlinks=False).st_size
            else:
                raise UnsafeError(f"`{root / name}` is no regular file", hint=_REBUILD)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise EdgegenError(f"`{path}` cannot be read: {error.strerror}") from error


def _check_paths(manifest: Manifest) -> None:
    """Every path is contained, every path that something points to is listed, every artifact has its component."""
    for name in manifest.files:
        relative_path(name)
    pointed = [manifest.tokenizer] if manifest.tokenizer is not None else []
    for fixture in manifest.fixtures:
        pointed += [*fixture.inputs.values(), *fixture.conditioning.values()]
        pointed += [fixture.noise, fixture.image, fixture.picture]
        pointed += [*fixture.predictions, *fixture.latents]
        if fixture.other is not None:
            pointed += [*fixture.other.inputs.values(), *fixture.other.predictions]
    for call in manifest.component_fixtures:
        pointed += [*call.inputs.values(), *call.outputs.values()]
    for name in pointed:
        if relative_path(name) not in manifest.files:
            raise EdgegenError(f"manifest points to `{name}` and does not list it", hint=_REBUILD)
    seen = set()
    for one in manifest.artifacts:
        relative_path(one.path)
        if not _files_of(manifest, one):
            raise EdgegenError(f"manifest points to `{one.path}` and does not list it", hint=_REBUILD)
        if one.component not in manifest.components:
            raise EdgegenError(f"artifact `{one.path}` is of component `{one.component}`, which the manifest lacks")
        if (one.backend, one.component) in seen:
            raise EdgegenError(f"manifest has two artifacts of `{one.component}` for backend `{one.backend}`")
        seen.add((one.backend, one.component))
    _check_shared(manifest)


def _files_of(manifest: Manifest, artifact: Artifact) -> list[str]:
    """The listed files that `artifact` is: one, or those of its folder."""
    if artifact.path in manifest.files:
        return [artifact.path]
    return [name for name in manifest.files if name.startswith(f"{artifact.path}/")]


def _check_shared(manifest: Manifest) -> None:
    """Artifacts have a path each, or are functions of one package and agree on all else that is true of a package."""
    by_path: dict[str, list[Artifact]] = {}
    for one in manifest.artifacts:
        by_path.setdefault(one.path, []).append(one)
    for path, sharing in by_path.items():
        outer = next((other for other in by_path if path.startswith(f"{other}/")), None)
        if outer is not None:
            raise EdgegenError(f"artifact `{path}` is inside artifact `{outer}`", hint=_REBUILD)
        size = sum(manifest.files[name].bytes for name in _files_of(manifest, sharing[0]))
        for one in sharing:
            if one.bytes != size:
                raise EdgegenError(
                    f"artifact `{path}` of `{one.component}` is said to have {one.bytes} bytes, its files have {size}",
                    hint=_REBUILD,
                )
        functions = [one.function for one in sharing]
        if any(functions) and not path.endswith(SUFFIX):
            raise EdgegenError(f"artifact `{path}` names a function, which only a `{SUFFIX}` has", hint=_REBUILD)
        if len(sharing) > 1 and (None in functions or len(set(functions)) != len(functions)):
            parts = ", ".join(f"`{one.component}`" for one in sharing)
            raise EdgegenError(
                f"{parts} are all said to be `{path}`, without a function of its own each", hint=_REBUILD
            )
        backends = sorted({one.backend for one in sharing})
        if len(backends) > 1:
            raise EdgegenError(f"artifact `{path}` is said to be of {' and of '.join(backends)}", hint=_REBUILD)


def _check_numbers(manifest: Manifest) -> None:
    """Sizes that can be allocated, and a sampler whose every coefficient is a number."""
    shapes = [(spec.name, spec.shape) for io in manifest.components.values() for spec in (*io.inputs, *io.outputs)]
    if manifest.latent is not None:
        shapes.append(("latent", manifest.latent.shape))
        _check_finite("latent", manifest.latent.scale, manifest.latent.shift)
    _check_finite("conditions", *manifest.conditions.values())
    for name, shape in shapes:
        if any(size < 1 for size in shape) or math.prod(shape) > TENSOR_LIMIT:
            raise UnsafeError(f"manifest gives tensor `{name[:100]}` the shape {str(shape)[:100]}")
    if manifest.sampler is None:
        return
    if manifest.sampler.default_steps not in manifest.sampler.tables:
        raise EdgegenError(f"manifest has no sampler table for its default of {manifest.sampler.default_steps} steps")
    for steps, table in manifest.sampler.tables.items():
        if not 1 <= steps <= STEPS_LIMIT or len(table) != steps:
            raise EdgegenError(f"manifest's sampler table for {steps} steps has {len(table)} rows")
        for row in table:
            _check_finite(f"sampler table for {steps} steps", *row.model_dump().values())


def _check_finite(what: str, *values: float) -> None:
    if not all(math.isfinite(value) for value in values):
        raise EdgegenError(f"manifest's {what} holds a value that is no finite number", hint=_REBUILD)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twin[:100]!r} appears twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _named(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
