"""`.mlpackage` folders with the same bytes for the same model, and their reading back without Core ML.

coremltools writes random item identifiers, protobuf maps in whatever order a process has them, and the day of
conversion. None of that means anything to Core ML: identifiers need only be unique within `Manifest.json`. Here
identifiers are UUIDv5 (RFC 9562) of an item's path and content, maps are sorted, and the date is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.signature import reason

_AUTHOR = "com.apple.CoreML"
MODEL_FOLDER = f"Data/{_AUTHOR}"
"""Where a package keeps its model; weight files are below it."""
SUFFIX = ".mlpackage"
MAIN = "main"
"""The function of a package that has one."""
FUNCTION_NAME = r"^[A-Za-z_][A-Za-z0-9_]{0,62}$"
"""What else a function may be called: MIL's identifiers, which are Swift's too."""
_MODEL = f"{_AUTHOR}/model.mlmodel"
_WEIGHTS = f"{_AUTHOR}/weights"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "mlpackage.edgegen")
# Metadata that says when and where, not what.
_VOLATILE = ("com.github.apple.coremltools.conversion_date",)


def write_package(spec: Any, weights_dir: Path, package: Path) -> None:
    """Write `spec` (a `Model` protobuf) and the blobs of `weights_dir` as `package`. Same in, same bytes."""
    for key in _VOLATILE:
        spec.description.metadata.userDefined.pop(key, None)
    data = package / "Data"
    model = data / _MODEL
    model.parent.mkdir(parents=True)
    model.write_bytes(spec.SerializeToString(deterministic=True))
    items = [_item(data, _MODEL, "CoreML Model Specification")]
    root = items[0][0]
    blobs = sorted(path for path in weights_dir.rglob("*") if path.is_file())
    if blobs:
        for blob in blobs:
            copy = data / _WEIGHTS / blob.relative_to(weights_dir)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                copy.hardlink_to(blob)  # the converter wrote it a moment ago, and throws it away
            except OSError:
                shutil.copyfile(blob, copy)
        items.append(_item(data, _WEIGHTS, "CoreML Model Weights"))
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": dict(items), "rootModelIdentifier": root}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")
    _even_modes(package)


def _item(data: Path, path: str, description: str) -> tuple[str, dict[str, str]]:
    digest = hashlib.sha256(path.encode())
    for file in sorted(data.joinpath(path).rglob("*")) if (data / path).is_dir() else [data / path]:
        digest.update(file.relative_to(data).as_posix().encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    identifier = str(uuid.uuid5(_NAMESPACE, digest.hexdigest()))
    name = path.rpartition("/")[2]
    return identifier, {"author": _AUTHOR, "description": description, "name": name, "path": path}


def _even_modes(package: Path) -> None:
    """Modes a folder of files gets anyway; the converter's temporary files are readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in package.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def function_path(package: Path, function: str) -> Path:
    """One function of a package as a path, to be loaded: `model.mlpackage/encode`. No file is there."""
    return package / function


def split_function(path: Path) -> tuple[Path, str | None]:
    """The package of a path, and its function where `function_path` made it."""
    return (path.parent, path.name) if path.parent.suffix == SUFFIX else (path, None)


def shown(path: Path) -> str:
    """A package, or a function of one, as messages name it."""
    package, function = split_function(path)
    return package.name if function is None else f"{package.name}/{function}"


def read_spec(path: Path) -> Any:
    """The `Model` protobuf of a package (or of a function's package); EdgegenError when the folder is none."""
    import coremltools as ct

    package, _ = split_function(path)
    try:
        return ct.utils.load_spec(str(package))
    except Exception as error:
        raise EdgegenError(f"`{package.name}` is not a readable Core ML package: {reason(error)}") from error


def read_program(package: Path, spec: Any) -> Any:
    """The PyMIL program of `package`, every constant read from its weight blobs. EdgegenError when that fails."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.frontend.milproto.load import load

    try:
        return load(spec, spec.specificationVersion, file_weights_dir=str(package / MODEL_FOLDER / "weights"))
    except Exception as error:
        raise EdgegenError(f"the program of `{package.name}` cannot be read back: {reason(error)}") from error
    finally:
        # Reading numbers what has no name, as converting does, which alone begins anew afterwards: the next package of
        # this process would have other names.
        Builder.name_count.clear()


def signature(spec: Any, path: Path) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs that a package declares, or one function of it (`path` as `function_path` gives it).

    EdgegenError for anything but float32 and int32 arrays, and for a function that is not there.
    """

    def tensor(feature: Any) -> TensorSpec:
        kind = feature.type.WhichOneof("Type")
        if kind != "multiArrayType":
            raise EdgegenError(f"`{feature.name}` of `{shown(path)}` is a {kind}, not an array")
        array = feature.type.multiArrayType
        dtype = array.ArrayDataType.Name(array.dataType).lower()
        if dtype not in ("float32", "int32"):
            raise EdgegenError(f"`{feature.name}` of `{shown(path)}` is {dtype}, expected float32 or int32")
        return TensorSpec(name=feature.name, shape=tuple(array.shape), dtype=dtype)

    said = _description(spec, path)
    return [tensor(f) for f in said.input], [tensor(f) for f in said.output]


def states(spec: Any, path: Path) -> tuple[str, ...]:
    """What a package, or one function of it, keeps between calls."""
    return tuple(feature.name for feature in _description(spec, path).state)


def _description(spec: Any, path: Path) -> Any:
    """Where the inputs and outputs of a function are described: a package with only one has no name for it there."""
    package, function = split_function(path)
    description = spec.description
    if not description.functions:
        if function not in (None, MAIN):
            raise EdgegenError(f"`{package.name}` has no function `{function}`, it has `{MAIN}`")
        return description
    wanted = function or description.defaultFunctionName
    for one in description.functions:
        if one.name == wanted:
            return one
    have = ", ".join(f"`{one.name}`" for one in description.functions)
    raise EdgegenError(f"`{package.name}` has no function `{wanted}`, it has {have}")


def operations(program: Any) -> Counter[str]:
    """Operations of a PyMIL program by type, constants left out."""
    return Counter(
        operation.op_type
        for function in program.functions.values()
        for operation in function.operations
        if operation.op_type != "const"
    )
