"""Channels whose range dwarfs the rest: they take the codes of all the others. What no scale can move stays float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from edgegen.precision.plan import ComponentPlan
from edgegen.precision.repair.tensors import Samples, channel_first, seen
from edgegen.precision.sites import LINEAR, sites

RATIO = 16.0
"""A channel is an outlier where it reaches this many times as far as the median one: four of the eight bits."""


@dataclass(frozen=True)
class Outliers:
    """One op whose input or output has such channels, and how far the widest reaches, in medians."""

    key: str
    side: str
    channels: tuple[int, ...]
    ratio: float


def find_outliers(program: ExportedProgram, samples: Samples, ratio: float = RATIO) -> dict[str, Outliers]:
    """Site -> its worse side, over all `samples`; sites without outliers are not there."""
    known = {key: site for key, site in sites(program).items() if site.weight is not None}
    calls = {node.name: node for node in program.graph.nodes}
    axes: dict[str, int] = {}
    for site in known.values():
        node = calls[site.node]
        axis = -1 if node.target is LINEAR else 1
        axes.update({node.args[0].name: axis, node.name: axis})
    most: dict[str, Tensor] = {}
    for sample in samples:
        for name, value in seen(program, set(axes), sample).items():
            reach = channel_first(value, axes[name]).abs().amax(1)
            most[name] = torch.maximum(most.get(name, reach), reach)
    found: dict[str, Outliers] = {}
    for key, site in known.items():
        for side, name in (("input", calls[site.node].args[0].name), ("output", site.node)):
            reach = most[name]
            relative = reach / reach.median().clamp(min=1e-12)
            wide = relative > ratio
            worst = float(relative.max())
            if bool(wide.any()) and (key not in found or worst > found[key].ratio):
                found[key] = Outliers(key, side, tuple(wide.nonzero().flatten().tolist()), worst)
    return found


def kept_high(plan: ComponentPlan, found: Mapping[str, Outliers]) -> ComponentPlan:
    """`plan` with the static int8 ops of `found` in the component's float precision."""
    ops = {
        key: op.model_copy(update={"precision": plan.float_precision})
        if key in found and op.precision == "w8a8"
        else op
        for key, op in plan.ops.items()
    }
    return plan.model_copy(update={"ops": ops})
