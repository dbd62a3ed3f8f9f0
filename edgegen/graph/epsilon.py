"""Epsilons: the small numbers that keep a denominator from being 0, as arguments of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.edit import Editor

aten = torch.ops.aten
# Where an epsilon stands among the arguments, and what it is when it is left out.
_PLACES: dict[Any, tuple[int, float | None]] = {
    aten.add.Tensor: (1, None),
    aten.add.Scalar: (1, None),
    aten.clamp_min.default: (1, None),
    aten.clamp.default: (1, None),
    aten.group_norm.default: (4, 1e-5),
    aten.layer_norm.default: (4, 1e-5),
    aten.rms_norm.default: (3, torch.finfo(torch.float32).eps),
    # A norm that is written out may add its epsilon as the bias of the averaging that comes before the root.
    aten.linear.default: (2, None),
    aten.conv1d.default: (2, None),
    aten.conv2d.default: (2, None),
}


def epsilon(node: Node, constant: Callable[[Any], Tensor | None]) -> float | None:
    """The number that a call adds to every element of a value, or keeps it above; None where there is no such number.

    `constant` gives the weight behind an argument.
    """
    if node.target not in _PLACES:
        return None
    place, default = _PLACES[node.target]
    value = node.args[place] if len(node.args) > place else node.kwargs.get("min", node.kwargs.get("eps", default))
    if isinstance(value, Node):
        held = constant(value)
        uniform = held is not None and held.numel() > 0 and bool((held == held.flatten()[0]).all())
        value = held.flatten()[0].item() if uniform and held is not None else None
    value = default if value is None else value
    return float(value) if isinstance(value, int | float) else None


def set_epsilon(editor: Editor, node: Node, value: float) -> None:
    """Give a call that has an epsilon another one."""
    place, _ = _PLACES[node.target]
    given = node.args[place] if len(node.args) > place else None
    new: Any = value
    if isinstance(given, Node):
        held = editor.value(given)
        assert held is not None
        with editor.at(node):
            new = editor.constant(torch.full_like(held.detach(), value), f"{given.target}_raised")
    if len(node.args) > place:
        node.update_arg(place, new)
    else:
        node.kwargs = {name: kept for name, kept in node.kwargs.items() if name not in ("min", "eps")}
        node.args = (*node.args, *(None,) * (place - len(node.args)), new)
    editor.changes += 1
