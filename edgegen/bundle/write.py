"""Writing a bundle: assembled beside its destination, checked by opening it, put in place whole.

    write_bundle(Path("out/phone"), BundleContents(manifest, artifacts=[("onnx", folder)], files={...}, reports={...}))

What is in the folder:

    manifest.json                   `Manifest`
    components/<backend>/...        what each backend wrote, one or more files a component
    tokenizer/, fixtures/           as the manifest names them
    reports/, report.html           what this build measured: differs from run to run, so neither hashed nor listed
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel

from edgegen.bundle.manifest import FileEntry, Manifest
from edgegen.bundle.open import MANIFEST, UNLISTED, check_contents, open_bundle, read_manifest, relative_path
from edgegen.bundle.stage import Staging, stage, told_as_errors
from edgegen.errors import EdgegenError

_CHUNK = 4 * 2**20
LINKED_FROM = 64 * 2**20
"""Bytes: from here on copying and hashing a file again takes longer than it is worth."""


@dataclass(frozen=True)
class BundleContents:
    """Everything that goes into a bundle.

    `manifest` is complete but for `files`, which the writer fills in. `artifacts` are (backend, folder): what lies in
    the folder goes to `components/<backend>/`, so several components may bring a folder each. `files` maps a path in
    the bundle to a file or folder that is copied, or to its content. `reports` maps a name below `reports/` to a
    model or plain data (written as JSON), to text, or to a file or folder that is copied. `linkable` has files below
    the artifacts' folders that never change, and the sha256 of each: a large one becomes a hard link where the file
    system allows it, and is read-only from then on, since other bundles may share it.
    """

    manifest: Manifest
    artifacts: Sequence[tuple[str, Path]]
    files: Mapping[str, Path | bytes | str] = field(default_factory=dict)
    reports: Mapping[str, object] = field(default_factory=dict)
    linkable: Mapping[Path, str] = field(default_factory=dict)
    report_html: str | None = None


class BundleWriter:
    """The right to write one bundle; see `reserve`."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging

    def write(self, contents: BundleContents) -> Path:
        """Assemble, check by opening, make durable, put in place; once. Gives the bundle's path, resolved."""
        with told_as_errors(self._staging.destination):
            _fill(self._staging.path, contents)
            return self._staging.commit()


@contextmanager
def reserve(destination: Path) -> Iterator[BundleWriter]:
    """Hold `destination` against other builds for as long as the block runs, from before the work until it is written.

    UsageError when something other than a bundle or an empty folder is there; EdgegenError when another build holds
    it or its parent cannot be written.
    """
    with stage(destination, why_not_replaceable) as staging:
        yield BundleWriter(staging)


def write_bundle(destination: Path, contents: BundleContents) -> Path:
    """Write `contents` to `destination` and return it, resolved.

    An existing bundle there is replaced in one step, and lost at no instant; an empty folder is filled; anything else
    is a UsageError. EdgegenError when another build writes there, when the disk is full or cannot be written, or when
    the contents do not make a bundle that opens: then nothing has changed.
    """
    with reserve(destination) as writer:
        return writer.write(contents)


def why_not_replaceable(folder: Path) -> str | None:
    """Why the non-empty `folder` must not give way to a new bundle: it is none, or holds more than the bundle."""
    try:
        extra = check_contents(folder, read_manifest(folder), hashes=False, complete=False)
    except EdgegenError as error:
        return f"it is not empty and no edgegen bundle ({error.message})"
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        return f"it holds `{extra[0]}`{more} beside the bundle that would be lost"
    return None


def manifest_json(manifest: Manifest) -> str:
    """Deterministic JSON: keys sorted, but for the components, whose order is the order in which they run."""
    document = manifest.model_dump(mode="json")
    components = {name: _plain(io) for name, io in document["components"].items()}
    ordered = {key: components if key == "components" else _plain(document[key]) for key in sorted(document)}
    return json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def schema_json() -> str:
    """The JSON schema of `manifest.json`, as published in `manifest.schema.json` beside this module."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
    return json.dumps(_plain(schema), indent=2, ensure_ascii=False) + "\n"


def _fill(root: Path, contents: BundleContents) -> None:
    written: dict[str, FileEntry] = {}
    for backend, folder in contents.artifacts:
        if not folder.is_dir():
            raise EdgegenError(f"artifact folder `{folder}` of backend `{backend}` does not exist")
        _copy(folder, root, f"components/{backend}", written, contents.linkable)
    for name, source in contents.files.items():
        if isinstance(source, Path):
            _copy(source, root, name, written)
        else:
            _write(root, name, source.encode() if isinstance(source, str) else source, written)
    unlisted: dict[str, FileEntry] = {}
    for name, report in contents.reports.items():
        if isinstance(report, Path):
            _copy(report, root, f"reports/{name}", unlisted)
        else:
            text = report if isinstance(report, str) else report_json(report)
            _write(root, f"reports/{name}", text.encode(), unlisted)
    if contents.report_html is not None:
        _write(root, "report.html", contents.report_html.encode(), unlisted)
    stray = [name for name in written if name == MANIFEST or name.startswith(UNLISTED)]
    if stray:
        raise EdgegenError(f"`{stray[0]}` belongs to the writer, not to the files of a bundle")
    manifest = contents.manifest.model_copy(update={"files": dict(sorted(written.items()))})
    _write(root, MANIFEST, manifest_json(manifest).encode(), {})
    extra = open_bundle(root, check_hashes=False).extra_files
    assert not extra, extra


def report_json(report: object) -> str:
    """JSON of a report, keys sorted; infinity and NaN become the strings `Infinity`, `-Infinity`, `NaN`."""
    data = report.model_dump(mode="python") if isinstance(report, BaseModel) else report
    return json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Plain data with every mapping sorted by key and every float one that JSON has."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="python"))
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Path):
        return value.as_posix()
    return value


def _copy(
    source: Path, root: Path, name: str, written: dict[str, FileEntry], linkable: Mapping[Path, str] | None = None
) -> None:
    """Copy a file, or a folder with everything in it, to `name`. Symbolic links are refused: a bundle stands alone."""
    if source.is_symlink() or not (source.is_file() or source.is_dir()):
        raise EdgegenError(f"`{source}` cannot go into a bundle: it is no file and no folder")
    if source.is_file():
        known = (linkable or {}).get(source)
        if known is not None and _linked(source, root, name):
            written[PurePosixPath(name).as_posix()] = FileEntry(sha256=known, bytes=source.stat().st_size)
            return
        with source.open("rb") as stream:
            _write(root, name, iter(lambda: stream.read(_CHUNK), b""), written)
        return
    relative_path(name)
    (root / name).mkdir(parents=True, exist_ok=True)
    for part in sorted(source.iterdir()):
        _copy(part, root, f"{name}/{part.name}", written, linkable)


def _linked(source: Path, root: Path, name: str) -> bool:
    """Whether `name` is now another name of the large file `source`."""
    if source.stat().st_size < LINKED_FROM:
        return False
    path = root / relative_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.chmod(0o444)
        path.hardlink_to(source)
    except FileExistsError as error:
        raise EdgegenError(f"two files of the bundle want to be `{name}`") from error
    except OSError:  # another file system, or one without hard links
        return False
    return True


def _write(root: Path, name: str, content: Any, written: dict[str, FileEntry]) -> None:
    """Write one new file from bytes or an iterator of bytes, and note its size and sha256."""
    path = root / relative_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError as error:
        raise EdgegenError(f"two files of the bundle want to be `{name}`") from error
    with os.fdopen(handle, "wb") as stream:
        for chunk in (content,) if isinstance(content, bytes) else content:
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    written[PurePosixPath(name).as_posix()] = FileEntry(sha256=digest.hexdigest(), bytes=size)
