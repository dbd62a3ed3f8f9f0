"""Opening a `.mlpackage` folder that may be anything: its manifest, its model, its weight files."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from mlprogram.blob import BlobFile
from mlprogram.errors import ProgramError

_MANIFEST_BYTES = 1 << 20
_MODEL_BYTES = (1 << 31) - 1  # protobuf's own limit
_MODEL_PATH = "@model_path/"
_VERSIONS = range(6, 11)
"""Specification versions whose programs this evaluator knows: iOS 15 to iOS 26."""

_AGAIN = "copy the package again, as a whole folder, or convert it again"
_NAME_THE_FOLDER = "name the `.mlpackage` folder itself"
_UNTRUSTED = "do not use a package from a source that you do not trust; an honest one refers to its own files alone"


class Package:
    """The folder of one package. `spec` is its `Model` message; weight files are opened when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self._root = _folder(path)
        self._model = self._contained(self._model_path())
        self._blobs: dict[str, BlobFile] = {}
        self.spec = self._read_model()

    def _model_path(self) -> str:
        manifest = self._root / "Manifest.json"
        try:
            real = self._inside(manifest)
            if manifest.exists() and not real.is_file():
                raise ProgramError(f"`Manifest.json` of `{self.name}` is no file")
            if real.stat().st_size > _MANIFEST_BYTES:
                raise ProgramError(f"`Manifest.json` of `{self.name}` is larger than 1 MiB")
            content = json.loads(real.read_bytes())
            entries, root = content["itemInfoEntries"], content["rootModelIdentifier"]
            path = entries[root]["path"]
        except FileNotFoundError as error:
            raise ProgramError(f"`{self.name}` is no package: it has no `Manifest.json`", _NAME_THE_FOLDER) from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProgramError(f"`Manifest.json` of `{self.name}` does not say where the model is", _AGAIN) from error
        if not isinstance(path, str):
            raise ProgramError(f"`Manifest.json` of `{self.name}` does not say where the model is", _AGAIN)
        return f"Data/{path}"

    def _read_model(self) -> Any:
        from coremltools.proto import Model_pb2
        from google.protobuf.message import DecodeError

        if self._model.stat().st_size > _MODEL_BYTES:
            raise ProgramError(f"the model of `{self.name}` is larger than 2 GiB")
        spec = Model_pb2.Model()
        try:
            spec.ParseFromString(self._model.read_bytes())
        except DecodeError as error:
            raise ProgramError(f"the model of `{self.name}` is no Core ML model, or is cut off", _AGAIN) from error
        kind = spec.WhichOneof("Type")
        if kind != "mlProgram":
            raise ProgramError(
                f"`{self.name}` holds a {kind or 'model without content'}, not an ML Program",
                'convert the source again with coremltools, `convert_to="mlprogram"`',
            )
        if spec.specificationVersion not in _VERSIONS:
            known = f"{_VERSIONS.start} to {_VERSIONS.stop - 1}"
            raise ProgramError(
                f"`{self.name}` has specification version {spec.specificationVersion}, known are {known}",
                "convert for an older `minimum_deployment_target`, or use a newer evaluator",
            )
        return spec

    def blob(self, file_name: str) -> BlobFile:
        """The weight file that the program calls `file_name` (`@model_path/weights/weight.bin`)."""
        if file_name not in self._blobs:
            if not file_name.startswith(_MODEL_PATH):
                raise ProgramError(
                    f"weight file `{file_name}` of `{self.name}` is not below `{_MODEL_PATH}`", _UNTRUSTED
                )
            below = file_name.removeprefix(_MODEL_PATH)
            path = self._contained(str(PurePosixPath(*self._model.relative_to(self._root).parent.parts, below)))
            self._blobs[file_name] = BlobFile(path, below)
        return self._blobs[file_name]

    @property
    def model_folder(self) -> Path:
        """Where the model lies; weight files are below it."""
        return self._model.parent

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files opened so far."""
        return sum(blob.size for blob in self._blobs.values())

    def _contained(self, relative: str) -> Path:
        pure = PurePosixPath(relative)
        if pure.is_absolute() or ".." in pure.parts or "\\" in relative or "\0" in relative:
            raise ProgramError(f"path `{relative}` leaves the package `{self.name}`", _UNTRUSTED)
        path = self._inside(self._root / pure)
        if not path.is_file():
            raise ProgramError(f"`{relative}` is missing from the package `{self.name}`", _AGAIN)
        return path

    def _inside(self, path: Path) -> Path:
        try:
            real = path.resolve(strict=True)
        except FileNotFoundError:
            return path
        except (OSError, RuntimeError) as error:
            raise ProgramError(f"`{path.name}` of `{self.name}` cannot be opened: {error}") from error
        if not real.is_relative_to(self._root):
            raise ProgramError(f"`{path.name}` of `{self.name}` is a link that leaves the package", _UNTRUSTED)
        return real


def _folder(path: Path) -> Path:
    if path.suffix == ".mlmodelc" or (path / "coremldata.bin").exists():
        raise ProgramError(
            f"`{path.name}` is a compiled model; the `.mlpackage` it was compiled from can be read",
            "name the `.mlpackage`: compiling cannot be undone",
        )
    try:
        root = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ProgramError(f"`{path.name}` cannot be opened: {error}") from error
    if not root.is_dir():
        raise ProgramError(f"`{path.name}` is a file, not the folder of an ML Program (`.mlpackage`)", _NAME_THE_FOLDER)
    return root
