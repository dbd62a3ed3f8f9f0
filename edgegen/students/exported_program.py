"""A `.pt2`, checked before torch opens it.

`torch.export.load` trusts its file: it unpickles what `weights_only` refuses, evaluates shapes with sympy, executes
`guards_code` as Python, imports modules that a pytree spec names, and writes names from the file into generated source.
So the file is never opened. What it says is judged piece by piece, and a private copy is opened that holds judged
pieces only: raw tensors, and a graph rewritten without guards, metadata and sample inputs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from edgegen.errors import EdgegenError, UnsafeError
from edgegen.graph.capture import capture
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.archive import (
    DAMAGED_HINT,
    EXPORT_HINT,
    MAX_JSON_BYTES,
    MAX_PICKLE_BYTES,
    Archive,
    open_archive,
    parse_json,
    require_memory,
)
from edgegen.students.assembly import require_finite
from edgegen.students.config import ComponentConfig, StudentConfig
from edgegen.students.graph_check import check_graph
from edgegen.students.pickle_scan import require_plain
from edgegen.students.student import Component, Student

ARCHITECTURE = "exported_program"
MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/"
CONSTANTS = "data/constants/"
CONFIGS = {WEIGHTS: f"{WEIGHTS}model_weights_config.json", CONSTANTS: f"{CONSTANTS}model_constants_config.json"}
KEPT = ("archive_format", "archive_version", "byteorder", ".data/version", "version", ".data/serialization_id")
IGNORED = (".format_version", ".storage_alignment")

ELEMENT_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 12: 1, 13: 2}
"""torch's serialized scalar types -> bytes: integers, half, float, double, bool, bfloat16."""


def load_pt2(archive: Archive) -> Student:
    """A student of task `single`, whose component `model` is the exported program; shapes and dtypes are its own.

    Raises UnsafeError for pickled weights, custom objects, compiled code, operators outside aten and prims, source
    text; EdgegenError for damage, dynamic shapes, and inputs that are neither float32 nor int32.
    """
    _check_entries(archive)
    _check_samples(archive)
    graph = parse_json(archive.read(MODEL, MAX_JSON_BYTES), f"{MODEL} in {archive.name}")
    sanitised = check_graph(graph, archive.name)
    for folder, config in CONFIGS.items():
        _check_payload(archive, folder, config)
    require_memory(2 * sum(size for name, size in archive.sizes.items() if name.startswith("data/")), archive.name)
    return _open(archive, sanitised)


def _check_entries(archive: Archive) -> None:
    for name in archive.sizes:
        if name in KEPT or name in IGNORED or name in (MODEL, SAMPLES) or name in CONFIGS.values():
            continue
        if re.fullmatch(r"data/weights/weight_\d+|data/constants/tensor_\d+|extra/[^/]+", name):
            continue
        if name.startswith("data/aotinductor/"):
            found = "compiled code"
        elif "custom_obj" in name or "opaque_obj" in name:
            found = "a pickled object"
        elif name.startswith(("data/weights/", "data/constants/")):
            found = "pickled weights"
        else:
            found = "an entry that no export writes"
        raise UnsafeError(f"`{archive.name}` holds {found}: `{name}`", hint=EXPORT_HINT)
    for name in (MODEL, SAMPLES, *CONFIGS.values(), "archive_format", "archive_version"):
        if name not in archive.sizes:
            raise EdgegenError(f"`{archive.name}` has no entry `{name}`", hint=DAMAGED_HINT)
    if archive.read("archive_format", 16) != b"pt2":
        raise EdgegenError(f"`{archive.name}` does not call itself a pt2 archive", hint=DAMAGED_HINT)


def _check_samples(archive: Archive) -> None:
    """The one pickle of a `.pt2`. It is not needed and will not be copied; one that could run code convicts the
    file.
    """
    data = archive.read(SAMPLES, max(MAX_PICKLE_BYTES, 1 << 30))
    if not data:
        return
    name = f"{SAMPLES} in {archive.name}"
    if data[:2] != b"PK":
        raise UnsafeError(f"`{name}` is a bare pickle, which could run code", hint=EXPORT_HINT)
    inner = open_archive(data, name)
    require_plain(inner.read("data.pkl", MAX_PICKLE_BYTES), name, EXPORT_HINT)


def _check_payload(archive: Archive, folder: str, config: str) -> None:
    entries = parse_json(archive.read(config, MAX_JSON_BYTES), f"{config} in {archive.name}").get("config")
    if not isinstance(entries, dict):
        raise EdgegenError(f"`{config}` in `{archive.name}` lists no tensors", hint=DAMAGED_HINT)
    for key, entry in entries.items():
        where = f"tensor `{key}` in `{archive.name}`"
        try:
            _check_tensor(archive, folder, entry, where)
        except (KeyError, TypeError, AttributeError) as error:
            raise EdgegenError(f"{where} is described badly: {error!r}", hint=DAMAGED_HINT) from error
        if not re.fullmatch(r"[A-Za-z_][\w.]{0,1000}", key):
            raise UnsafeError(f"`{archive.name}` names a tensor {key[:80]!r}, which is not a name", hint=EXPORT_HINT)


def _check_tensor(archive: Archive, folder: str, entry: dict[str, Any], where: str) -> None:
    if entry["use_pickle"] is not False or entry["tensor_meta"] is None:
        raise UnsafeError(f"{where} is pickled: opening it could run code", hint=EXPORT_HINT)
    file = folder + str(entry["path_name"])
    if not re.fullmatch(r"weight_\d+|tensor_\d+", str(entry["path_name"])) or file not in archive.sizes:
        raise EdgegenError(f"{where} lies in `{file}`, which is not there", hint=DAMAGED_HINT)
    meta = entry["tensor_meta"]
    width = ELEMENT_BYTES.get(meta["dtype"])
    if width is None or meta["layout"] != 7:
        raise EdgegenError(f"{where} is not a dense tensor of a known dtype", hint=EXPORT_HINT)
    if meta["device"] != {"type": "cpu", "index": None}:
        raise EdgegenError(f"{where} is on device {meta['device']}", hint=f"move the module to the CPU; {EXPORT_HINT}")
    sizes, strides = ([part["as_int"] for part in meta[key]] for key in ("sizes", "strides"))
    numbers = [*sizes, *strides, meta["storage_offset"]["as_int"]]
    if len(sizes) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise EdgegenError(f"{where} has impossible sizes", hint=DAMAGED_HINT)
    if math.prod(sizes) * width > archive.sizes[file] or archive.sizes[file] % width:
        raise EdgegenError(f"{where} claims more elements than its {archive.sizes[file]} bytes hold", hint=DAMAGED_HINT)


def _open(archive: Archive, graph: dict[str, Any]) -> Student:
    with tempfile.TemporaryDirectory(prefix="edgegen-") as folder:
        copy = Path(folder) / "model.pt2"
        try:
            _write_copy(archive, graph, copy)
        except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, EOFError, struct.error) as error:
            raise EdgegenError(f"`{archive.name}` cannot be copied: {error}", hint=DAMAGED_HINT) from error
        # torch warns with a traceback of its own before it raises; the error below says it once.
        logger = logging.getLogger("torch.export")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            program = torch.export.load(copy)
            inputs, outputs = _signature(program, archive.name)
            module = Program(program.module(check_guards=False), program.graph_module.code)
        except EdgegenError:
            raise
        except Exception as error:  # a damaged graph surfaces as whatever it breaks
            reason = " ".join(str(error).split())[:200]
            raise EdgegenError(
                f"`{archive.name}` cannot be opened by torch {torch.__version__}: {type(error).__name__}: {reason}",
                hint=EXPORT_HINT,
            ) from error
        finally:
            logger.setLevel(level)
    require_finite("model", module, archive.name)
    part = ComponentConfig(architecture=ARCHITECTURE, config={}, inputs=inputs, outputs=outputs)
    name = student_name(PurePosixPath(archive.name).stem)
    config = StudentConfig(name=name, task="single", components={"model": part})
    return Student(config, {"model": Component("model", module, inputs, outputs)})


def save_pt2(student: Student, path: Path) -> None:
    """Write a student of one exported program as a `.pt2`, whole or not at all; EdgegenError when the disk refuses.

    Inputs keep their names; outputs are `output`, or `output_0` and so on, since a `.pt2` has no place for theirs.
    """
    (part,) = student.components.values()
    temporary = path.with_name(f".{path.stem}.partial.pt2")
    try:
        torch.export.save(capture(part), temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise EdgegenError(f"`{path}` cannot be written: {error}", hint="check the folder with `df -h`") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_copy(archive: Archive, graph: dict[str, Any], copy: Path) -> None:
    assert isinstance(archive.source, Path)
    written = {MODEL: json.dumps(graph).encode(), SAMPLES: b""}
    with zipfile.ZipFile(archive.source) as source, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:
        for name in archive.sizes:
            entry = zipfile.ZipInfo(f"{archive.root}/{name}")
            if name in written:
                target.writestr(entry, written[name])
            elif name in KEPT or name.startswith("data/"):
                with (
                    source.open(f"{archive.root}/{name}") as reader,
                    target.open(entry, "w", force_zip64=True) as writer,
                ):
                    shutil.copyfileobj(reader, writer, 1 << 20)


class Program(nn.Module):
    """The module of an exported program, without torch's refusal of `eval()`, which any module must answer.

    `code` is its graph as text: two programs of the same weights print differently, and so differ in fingerprint.
    """

    def __init__(self, inner: nn.Module, code: str) -> None:
        super().__init__()
        self.digest = hashlib.sha256(code.encode()).hexdigest()
        for name in ("train", "eval"):
            inner.__dict__.pop(name, None)
        self.inner = inner
        self.eval().requires_grad_(False)

    def extra_repr(self) -> str:
        return self.digest

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        made: torch.Tensor | tuple[torch.Tensor, ...] = self.inner(*inputs)
        return made


def _signature(program: Any, name: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature
    inputs = tuple(_spec(str(key), values.get(key), f"input `{key}` of `{name}`") for key in signature.user_inputs)
    keys = list(signature.user_outputs)
    outputs = tuple(
        _spec("output" if len(keys) == 1 else f"output_{i}", values.get(key), f"output `{key}` of `{name}`")
        for i, key in enumerate(keys)
    )
    if not inputs or not outputs:
        raise EdgegenError(f"`{name}` has {len(inputs)} inputs and {len(outputs)} outputs", hint=EXPORT_HINT)
    return inputs, outputs


def _spec(name: str, value: Any, where: str) -> TensorSpec:
    dtypes = {torch.float32: "float32", torch.int32: "int32"}
    if not isinstance(value, torch.Tensor):
        raise EdgegenError(f"{where} is not a tensor", hint=f"pass tensors only; {EXPORT_HINT}")
    if value.dtype not in dtypes:
        raise EdgegenError(
            f"{where} is {str(value.dtype).removeprefix('torch.')}; inputs and outputs must be float32 or int32",
            hint=f"cast inside the module; {EXPORT_HINT}",
        )
    if math.prod(value.shape) > 1 << 30:
        raise EdgegenError(f"{where} has shape {tuple(value.shape)}, more than 2^30 elements", hint=EXPORT_HINT)
    return TensorSpec.model_validate({"name": name, "shape": tuple(value.shape), "dtype": dtypes[value.dtype]})


def student_name(text: str) -> str:
    """`text` as a student's name: lower case, letters, digits, `.`, `_` and `-`."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).lstrip("._-")[:64]
    return name or "student"
