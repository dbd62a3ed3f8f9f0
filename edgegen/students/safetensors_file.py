"""safetensors files: the header is read and judged first, then tensors are memory-mapped."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgegen.errors import EdgegenError
from edgegen.students.archive import DAMAGED_HINT, parse_json, require_memory
from edgegen.students.sniff import MAX_SAFETENSORS_HEADER

if TYPE_CHECKING:
    from torch import Tensor


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (dtype, shape), from the header alone; EdgegenError when it does not fit the file."""
    try:
        size = path.stat().st_size
        if size < 8:
            raise EdgegenError(f"`{path.name}` is empty or cut off: {size} bytes", hint=DAMAGED_HINT)
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MAX_SAFETENSORS_HEADER):
                raise EdgegenError(f"`{path.name}` is cut off inside its header", hint=DAMAGED_HINT)
            data = stream.read(length)
    except (OSError, struct.error) as error:
        raise EdgegenError(f"`{path.name}` cannot be read: {error}", hint=DAMAGED_HINT) from error
    header = parse_json(data, f"the header of {path.name}")
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for key, entry in header.items():
        try:
            dtype, shape, (begin, stop) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            fits = all(type(n) is int and n >= 0 for n in (*shape, begin, stop)) and begin <= stop
        except (KeyError, TypeError, ValueError) as error:
            raise EdgegenError(f"`{path.name}` has a damaged entry for `{key}`", hint=DAMAGED_HINT) from error
        if not fits:
            raise EdgegenError(f"`{path.name}` has impossible sizes for `{key}`", hint=DAMAGED_HINT)
        tensors[key] = (dtype, shape)
        end = max(end, stop)
    if end != size - 8 - length:
        raise EdgegenError(
            f"`{path.name}` holds {size - 8 - length} bytes of weights where its header says {end}", hint=DAMAGED_HINT
        )
    return tensors


def read_tensors(paths: list[Path], wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    """Tensors of one or several files, mapped, not copied; those whose key is not `wanted` are left alone.

    Raises EdgegenError before anything is allocated when the weights, in fp32, are more than the free memory.
    """
    from safetensors import SafetensorError, safe_open

    headers = {path: read_header(path) for path in paths}
    needed = sum(
        4 * math.prod(shape) for tensors in headers.values() for key, (_, shape) in tensors.items() if wanted(key)
    )
    require_memory(needed, paths[0].name)
    state: dict[str, Tensor] = {}
    for path, tensors in headers.items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for key in tensors:
                    if wanted(key):
                        state[key] = file.get_tensor(key)
        except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            raise EdgegenError(f"`{path.name}` is damaged: {error}", hint=DAMAGED_HINT) from error
    return state


def read_metadata(path: Path) -> dict[str, str]:
    """The text that a file carries beside its tensors; empty where it has none."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        found = parse_json(stream.read(min(length, MAX_SAFETENSORS_HEADER)), f"the header of {path.name}")
    metadata = found.get("__metadata__")
    if not isinstance(metadata, dict):
        return {}
    return {str(key): value for key, value in metadata.items() if isinstance(value, str)}
