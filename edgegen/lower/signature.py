"""Names, shapes and dtypes held against the specs: of an artifact when it is made or loaded, of arrays at each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array


def check_product(component: str, path: Path) -> None:
    """The artifact must exist and hold bytes. Raises EdgegenError naming the component."""
    if not path.is_file() or path.stat().st_size == 0:
        raise EdgegenError(f"lowering `{component}` wrote no `{path.name}`")


def check_signature(what: str, side: str, found: Sequence[TensorSpec], specs: Sequence[TensorSpec]) -> None:
    """What an artifact says of one `side` (inputs or outputs) must be the specs, in any order. Raises EdgegenError."""
    by_name = {tensor.name: tensor for tensor in found}
    for spec in specs:
        tensor = by_name.pop(spec.name, None)
        if tensor is None:
            names = ", ".join(f"`{other.name}`" for other in found) or "none"
            raise EdgegenError(f"{what} has no `{spec.name}` among its {side}: {names}")
        if tensor != spec:
            raise EdgegenError(
                f"{what} has `{spec.name}` as {describe(tensor)} among its {side}, expected {describe(spec)}"
            )
    if by_name:
        raise EdgegenError(f"{what} has `{next(iter(by_name))}` among its {side}, which no spec names")


def check_call(what: str, inputs: Mapping[str, Array], specs: Sequence[TensorSpec]) -> None:
    """The arrays of one call must be those that the specs name, with their shapes and dtypes. Raises EdgegenError."""
    known = {spec.name for spec in specs}
    expected = ", ".join(f"`{spec.name}`" for spec in specs)
    for name in inputs:
        if name not in known:
            raise EdgegenError(f"{what} has no input `{name}`", hint=f"its inputs are {expected}")
    for spec in specs:
        if spec.name not in inputs:
            raise EdgegenError(f"{what} was called without its input `{spec.name}`", hint=f"its inputs are {expected}")
        array = inputs[spec.name]
        if tuple(array.shape) != spec.shape or array.dtype.name != spec.dtype:
            given = f"{array.dtype.name}{list(array.shape)}"
            raise EdgegenError(f"input `{spec.name}` of {what} is {given}, expected {describe(spec)}")


def describe(spec: TensorSpec) -> str:
    """A spec as it is written in messages: `float32[1, 4, 16, 16]`."""
    return f"{spec.dtype}{list(spec.shape)}"


def reason(error: BaseException) -> str:
    """The first line of a library's exception with its type, short enough for one line of a message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
