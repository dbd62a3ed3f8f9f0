"""How repaired tensors lie in a file: those on a grid as their codes, a byte each, and what makes numbers of them.

`name` alone is a tensor as it is. `name|codes` with `name|scales` is int8 times a scale for each channel, whose shape
broadcasts to that of the codes; `name|codes` with `name|table` is places in a table of at most 256 values. Either is
chosen where it gives the tensor back bit for bit, but for the sign of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgegen.errors import EdgegenError
from edgegen.precision.encode import encode_weight
from edgegen.precision.plan import OpPlan

CODES, SCALES, TABLE = "|codes", "|scales", "|table"
_INT8 = OpPlan(op="conv", precision="w8")
_SAMPLE = 4096
"""Elements that tell whether a tensor may have few enough values for a table."""


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the file holds of `tensors`."""
    made: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parts = _parts(value.detach())
        made |= {f"{name}{suffix}": part.contiguous() for suffix, part in parts.items()}
    return made


def unpacked(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `packed` was given. EdgegenError for parts that do not fit together."""
    found: dict[str, Tensor] = {}
    for name, value in held.items():
        stem, mark, suffix = name.rpartition("|")
        if not mark:
            found[name] = value
        elif mark + suffix == CODES:
            found[stem] = _joined(stem, value, held)
        elif mark + suffix not in (SCALES, TABLE) or f"{stem}{CODES}" not in held:
            raise EdgegenError(f"a repaired tensor is called `{name}`, which is no part of one", hint=_AGAIN)
    return found


_AGAIN = "make the plan again"


def _parts(value: Tensor) -> dict[str, Tensor]:
    if value.dim() < 2 or value.dtype is not torch.float32 or not torch.isfinite(value).all():
        return {"": value}
    for axis in (0, 1):
        encoded = encode_weight(value, _INT8, axis)
        if encoded.scales is not None and torch.equal(encoded.decode(), value):
            shape = [1] * value.dim()
            shape[axis] = -1
            return {CODES: encoded.codes, SCALES: encoded.scales.view(shape)}
    if len(torch.unique(value.flatten()[:_SAMPLE])) <= 256:
        table, places = torch.unique(value, return_inverse=True)
        if len(table) <= 256 and 4 * len(table) < 3 * value.numel() and torch.equal(table[places], value):
            return {CODES: places.to(torch.uint8), TABLE: table}
    return {"": value}


def _joined(name: str, codes: Tensor, held: Mapping[str, Tensor]) -> Tensor:
    scales, table = held.get(f"{name}{SCALES}"), held.get(f"{name}{TABLE}")
    if codes.dtype is torch.int8 and scales is not None and table is None and _broadcasts(scales, codes):
        return codes.float() * scales
    places = codes.dtype is torch.uint8 and table is not None and table.dim() == 1 and scales is None
    if places and table is not None and (codes.numel() == 0 or int(codes.max()) < len(table)):
        return table[codes.long()]
    raise EdgegenError(f"the repaired tensor `{name}` cannot be made of its codes", hint=_AGAIN)


def _broadcasts(scales: Tensor, codes: Tensor) -> bool:
    same = scales.dim() == codes.dim()
    return same and all(one in (1, size) for one, size in zip(scales.shape, codes.shape, strict=True))
