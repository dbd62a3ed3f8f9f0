"""What a network computes by beside its weights: numbers, names and functions that its modules hold.

Two networks may print alike and hold equal weights and yet differ: in an activation that is called as a function, in
how many heads share a projection, in an epsilon. A fingerprint without these would take one for the other.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.Size, Enum)
DEPTH = 6


def settings(module: nn.Module) -> Iterator[str]:
    """A line for every module and attribute that is plain data, in the order of the network; the same in every
    process. Weights are not in it, nor is whether it is in training."""
    for path, one in module.named_modules():
        yield f"{path}: {type(one).__module__}.{type(one).__qualname__}"
        for key, value in sorted(vars(one).items()):
            if not key.startswith("_") and key != "training":
                yield f"{path}.{key}={plain(value)}"
        # diffusers keeps what a network was made from behind a property.
        given = vars(one).get("_internal_dict")
        if isinstance(given, Mapping):
            yield f"{path} from {plain({key: one for key, one in given.items() if not key.startswith('_')})}"


def plain(value: Any, depth: int = DEPTH) -> str:
    """`value` as text, without addresses in memory; of what has no text of its own, its type."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        items = sorted((plain(key, depth - 1), plain(one, depth - 1)) for key, one in value.items())
        return "{" + ", ".join(f"{key}: {one}" for key, one in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain(one, depth - 1) for one in value) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(plain(one, depth - 1) for one in value)) + "}"
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    if isinstance(value, functools.partial):
        return f"{plain(value.func, depth - 1)}({plain(value.args, depth - 1)}, {plain(value.keywords, depth - 1)})"
    if isinstance(value, FunctionType) and value.__name__ == "<lambda>":
        return f"{value.__module__}.{value.__qualname__} {value.__code__.co_code.hex()} {value.__code__.co_names}"
    if isinstance(value, FunctionType | BuiltinFunctionType | MethodType | type):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict):  # transformers' configs; with an underscore: where it was read from
        told = {key: one for key, one in to_dict().items() if not str(key).startswith("_")}
        return json.dumps(told, sort_keys=True, default=str)
    return type(value).__qualname__
