"""The edgegen checkpoint: a torch zip of plain data, read with `weights_only=True` and nothing else.

{"format": "edgegen", "version": 1, "config": StudentConfig as plain data, "tokenizer": str | None,
"state_dicts": {component: {parameter: tensor}}}
"""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from edgegen.errors import EdgegenError, UnsafeError
from edgegen.students.architectures import ARCHITECTURES
from edgegen.students.archive import DAMAGED_HINT, MAX_PICKLE_BYTES, Archive, require_memory
from edgegen.students.assembly import State, build_student, parse_config
from edgegen.students.pickle_scan import require_plain
from edgegen.students.sniff import PACK_HINT
from edgegen.students.student import Student

FORMAT = "edgegen"
VERSION = 1


def read_plain(archive: Archive) -> Any:
    """The payload of a torch zip whose pickle names plain tensors only; tensors stay memory-mapped.

    Raises UnsafeError when the pickle names anything else, EdgegenError when the file is damaged or larger than memory.
    """
    require_plain(archive.read("data.pkl", MAX_PICKLE_BYTES), archive.name, PACK_HINT)
    require_memory(sum(archive.sizes.values()), archive.name)
    assert isinstance(archive.source, Path)
    try:
        if archive.source.suffix == ".safetensors":
            # torch.load believes this one suffix, so it is given no name to believe.
            with archive.source.open("rb") as stream:
                return torch.load(stream, map_location="cpu", weights_only=True)
        return torch.load(archive.source, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0][:200]
        raise UnsafeError(f"`{archive.name}` is not plain data: {first}", hint=PACK_HINT) from error
    except Exception as error:  # damaged bytes surface as whatever they break
        reason = " ".join(str(error).split())[:200]
        raise EdgegenError(f"`{archive.name}` is damaged: {reason}", hint=DAMAGED_HINT) from error


def load_pt(archive: Archive) -> Student:
    """The student in an edgegen `.pt`."""
    payload = read_plain(archive)
    name = archive.name
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise EdgegenError(
            f"`{name}` holds tensors but no edgegen config: a plain state dict does not say what network it is",
            hint=f"`edgegen student pack {name} --config student.json -o packed.pt`",
        )
    if payload.get("version") != VERSION:
        raise EdgegenError(
            f"`{name}` is a checkpoint of version {payload.get('version')!r}, and this edgegen reads {VERSION}",
            hint="`pip install --upgrade edgegen`",
        )
    config, tokenizer, state = (payload.get(key) for key in ("config", "tokenizer", "state_dicts"))
    if not isinstance(config, dict):
        raise EdgegenError(f"`{name}` has no `config`", hint=DAMAGED_HINT)
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise EdgegenError(f"`tokenizer` of `{name}` must be text, not a {type(tokenizer).__name__}")
    return build_student(parse_config(config, name), _state(state, name), tokenizer, name)


def _state(state: Any, name: str) -> State:
    if not isinstance(state, dict) or not all(isinstance(part, dict) for part in state.values()):
        raise EdgegenError(f"`state_dicts` of `{name}` must map components to their tensors", hint=DAMAGED_HINT)
    return {str(component): {str(key): value for key, value in part.items()} for component, part in state.items()}


def save_pt(student: Student, path: Path) -> None:
    """Write `student` as an edgegen `.pt`: the same bytes for the same student, whole or not at all.

    Raises EdgegenError for a component whose network is not one of edgegen's own (an exported program), and when the
    disk refuses.
    """
    for name, part in student.config.components.items():
        if part.architecture not in ARCHITECTURES:
            raise EdgegenError(
                f"component `{name}` is an `{part.architecture}`, which a `.pt` cannot hold",
                hint="keep the `.pt2` it came from",
            )
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "config": student.config.model_dump(mode="json"),
        "tokenizer": student.tokenizer_json,
        "state_dicts": _own_storages(student),
    }
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            temporary = Path(stream.name)
            torch.save(payload, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        temporary = None
    except (OSError, RuntimeError) as error:
        raise EdgegenError(f"`{path}` cannot be written: {error}", hint="check the folder with `df -h`") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _own_storages(student: Student) -> State:
    """Every tensor as the only one of its storage, as a file that is the same for the same numbers wants it; copied
    only where it is not so already, since a student may be as large as half the memory."""
    taken: set[int] = set()
    found: State = {}
    for name, component in student.components.items():
        found[name] = {}
        for key, value in component.module.state_dict().items():
            kept = value.detach().contiguous()
            storage = kept.untyped_storage()
            if storage.data_ptr() in taken or storage.nbytes() != kept.numel() * kept.element_size():
                kept = kept.clone()
            taken.add(kept.untyped_storage().data_ptr())
            found[name][key] = kept
    return found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
