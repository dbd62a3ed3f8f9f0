"""Inputs that a user gives in an `.npz`: what a student without prompts is calibrated and verified on."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgegen.errors import EdgegenError, UsageError
from edgegen.students.archive import require_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgegen.graph.tensor_spec import TensorSpec
    from edgegen.students.student import Student

MAX_SAMPLES = 64
SAVE_HINT = "write it with `numpy.savez('inputs.npz', name=array, ...)`, one array for each input"

Arrays = Mapping[str, "NDArray[Any]"]


def read_inputs(path: Path) -> Arrays:
    """The arrays of `path` by name, none of them pickled. EdgegenError for what is damaged or larger than memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            require_memory(sum(entry.file_size for entry in archive.infolist()), path.name)
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise EdgegenError(f"`{path}` cannot be read as inputs: {error}", hint=SAVE_HINT) from error
    if not found:
        raise EdgegenError(f"`{path}` holds no arrays", hint=SAVE_HINT)
    return found


def with_inputs(student: Student, arrays: Arrays, name: str) -> Student:
    """`student` with these examples in place of random ones: each array has the shape of its input, or one dimension
    more in front, the same number of samples for all.

    UsageError for a student that draws from prompts, for names, shapes and dtypes that do not fit, and for NaN.
    """
    if student.config.task != "single":
        raise UsageError(
            f"student `{student.config.name}` makes its own inputs from prompts", hint="leave `--inputs` out"
        )
    (part,) = student.components.values()
    several = stacked(part.inputs, arrays, name)
    import torch

    examples = tuple(
        tuple(torch.from_numpy(several[spec.name][index].copy()) for spec in part.inputs)
        for index in range(len(next(iter(several.values()))))
    )
    return replace(student, components={part.name: replace(part, examples=examples)})


def stacked(specs: Sequence[TensorSpec], arrays: Arrays, name: str) -> dict[str, NDArray[Any]]:
    """`arrays` of the file `name` as an input [N, *shape] for each of `specs`, in its dtype; the same N for all.

    UsageError for names, shapes and dtypes that do not fit, and for NaN.
    """
    wanted = [spec.name for spec in specs]
    if sorted(arrays) != sorted(wanted):
        raise UsageError(f"`{name}` holds {_listed(arrays)}, and the student takes {_listed(wanted)}", hint=SAVE_HINT)
    several = {spec.name: _samples(arrays[spec.name], spec, name) for spec in specs}
    counts = {len(value) for value in several.values()}
    if len(counts) != 1 or not 1 <= max(counts) <= MAX_SAMPLES:
        raise UsageError(f"`{name}` holds {sorted(counts)} samples of its inputs, not one number in 1..{MAX_SAMPLES}")
    return several


def _samples(array: NDArray[Any], spec: TensorSpec, name: str) -> NDArray[Any]:
    """[N, *shape] in the dtype of the input."""
    if array.shape == spec.shape:
        array = array[None]
    if array.shape[1:] != spec.shape:
        raise UsageError(
            f"`{spec.name}` in `{name}` has shape {list(array.shape)}, and the input is {list(spec.shape)}",
            hint="several samples have one more dimension in front",
        )
    integers = np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_
    if integers != (spec.dtype == "int32") or array.dtype.kind not in "biuf":
        raise UsageError(f"`{spec.name}` in `{name}` is {array.dtype}, and the input is {spec.dtype}")
    limits = np.iinfo(np.int32)
    if integers and array.size and not limits.min <= int(array.min()) <= int(array.max()) <= limits.max:
        raise UsageError(f"`{spec.name}` in `{name}` holds numbers that int32 has not")
    made = array.astype(spec.dtype)
    if not np.isfinite(made).all():
        raise UsageError(
            f"`{spec.name}` in `{name}` holds NaN, infinity or numbers that float32 has not", hint=SAVE_HINT
        )
    return made


def _listed(names: Any) -> str:
    return ", ".join(f"`{one}`" for one in sorted(names))
