"""What is computed once for a student and its artifacts, and found again by the next target or the next build: the
reference in torch, and what verification found of artifacts that met every gate."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache as memoize
from pathlib import Path

import edgegen
from edgegen.build.lowering import LoweredComponent, compiler_fingerprint, distributions, tool_versions
from edgegen.bundle.manifest import ComponentIO, SamplerTable
from edgegen.cache import Cache
from edgegen.lower.backend import get_backend
from edgegen.profile.host import this_host
from edgegen.students.student import Student
from edgegen.verify.fixtures import store
from edgegen.verify.reference import reference
from edgegen.verify.trajectory import Reference, Signature
from edgegen.verify.worker import StoredReference, Verified, VerifyJob

_OWN = ("diffusers", "edgegen", "torch", "transformers")
"""Packages whose networks are known by their versions; the code of others may change under one name."""


def remembered_reference(
    student: Student, step_counts: Sequence[int] | None, signatures: Mapping[str, Signature], cache: Cache
) -> Reference:
    """What `edgegen.verify.reference.reference` gives, drawn once for each student and version of what draws it."""
    if any(type(one).__module__.split(".")[0] not in _OWN for one in _modules(student)):
        return reference(student, step_counts=step_counts, signatures=signatures)
    config = student.config
    components = {name: ComponentIO(inputs=one.inputs, outputs=one.outputs) for name, one in signatures.items()}
    key = cache.key(
        "reference",
        student=student.fingerprint,
        steps=list(step_counts or ()),
        signatures={name: io.model_dump(mode="json") for name, io in components.items()},
        versions=distributions("numpy", "torch", "diffusers", "transformers"),
        sources=_sources("students", "verify", "bundle"),
    )

    def draw(entry: Path) -> None:
        drawn = reference(student, step_counts=step_counts, signatures=signatures)
        fixtures, calls = store(drawn, entry)
        table = None
        if config.sampler is not None and step_counts:
            tables = {count: config.sampler.table(count) for count in sorted(config.sampler.times)}
            table = SamplerTable(config=config.sampler, default_steps=step_counts[0], tables=tables)
        stored = StoredReference(
            root=Path(),
            components=components,
            fixtures=fixtures,
            component_fixtures=calls,
            sampler=table,
            latent=config.latent,
            conditions=config.conditions,
        )
        (entry / "reference.json").write_text(stored.model_dump_json())

    entry = cache.directory(key, draw)
    found = StoredReference.model_validate_json((entry / "reference.json").read_bytes())
    return found.model_copy(update={"root": entry}).restored()


def remembered_verification(
    job: VerifyJob,
    lowered: Mapping[str, LoweredComponent],
    cache: Cache,
    log: Path,
    verify: Callable[[VerifyJob, Path], Verified],
) -> tuple[Verified, bool]:
    """What `verify` says of `job`, and whether it had been said before: of the same artifacts, held against the same
    reference with the same gates, on a host like this one. Only what met every gate is kept, with its measurements,
    pictures and log."""
    backend = get_backend(job.backend)
    host = this_host()
    key = cache.key(
        "verify",
        # An entry's key says everything that made it.
        artifacts={name: [one.entry.name, one.function] for name, one in lowered.items()},
        joined=sorted({one.joined.package.parent.parent.name for one in lowered.values() if one.joined is not None}),
        job=job.model_dump(mode="json", exclude={"artifacts", "reference", "pictures"}),
        reference=job.reference.model_dump(mode="json", exclude={"root"}),
        fixtures=_content(job.reference.root / "fixtures"),
        host=[host.cpu, host.machine, host.os, host.python, host.cpus_usable, host.threads],
        versions=tool_versions(backend),
        sources=[compiler_fingerprint(), _sources("verify", "profile", "bundle", "students"), _evaluator()],
    )
    fresh: list[Verified] = []

    def make(entry: Path) -> None:
        found = verify(job, log)
        fresh.append(found)
        if found.parity.status != "passed":
            raise _NotKeptError
        (entry / "verified.json").write_text(found.model_dump_json())
        shutil.copyfile(log, entry / "log.txt")
        if job.pictures.is_dir():
            shutil.copytree(job.pictures, entry / "pictures")

    try:
        entry = cache.directory(key, make)
    except _NotKeptError:
        return fresh[0], False
    if fresh:
        return fresh[0], False
    log.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(entry / "log.txt", log)
    if (entry / "pictures").is_dir():
        shutil.copytree(entry / "pictures", job.pictures, dirs_exist_ok=True)
    return Verified.model_validate_json((entry / "verified.json").read_bytes()), True


class _NotKeptError(Exception):
    """A gate was not met: it is to be looked at again next time."""


def _modules(student: Student) -> list[object]:
    return [module for part in student.components.values() for module in part.module.modules()]


def _content(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(path.relative_to(folder).as_posix().encode())
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@memoize
def _sources(*folders: str) -> str:
    """sha256 over the sources of these folders of the package."""
    return _hash_sources(*(Path(edgegen.__file__).parent / folder for folder in folders))


@memoize
def _evaluator() -> str:
    import mlprogram

    return _hash_sources(Path(mlprogram.__file__).parent)


def _hash_sources(*folders: Path) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
