"""Errors of ops and gradients at their outputs: the two halves of what an op's precision does further on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.precision.conditioning import pack
from edgegen.precision.sensitivity import Key, Options
from edgegen.precision.simulate import Changed, Network

Changes = Mapping[str, tuple[Key, list[Changed]]]
"""Call -> its op, and what each option makes of it."""


@dataclass(frozen=True)
class Tap:
    """The output of one op in one call, and the error [E, ...] that each of its options makes there."""

    key: Key
    value: Tensor
    errors: Tensor


class Dots:
    """Option -> sums of gradient times error, one for each functional of the picture."""

    def __init__(self, options: Options, functionals: int) -> None:
        self.sums = {key: torch.zeros(len(ops), functionals, dtype=torch.float64) for key, ops in options.items()}

    def add(self, taps: Sequence[Tap], found: Sequence[Tensor | None], functional: int) -> None:
        for tap, gradient in zip(taps, found, strict=True):
            if gradient is not None:
                self.sums[tap.key][:, functional] += (tap.errors.flatten(1) @ gradient.reshape(-1)).double()


def changes(networks: Mapping[str, Network], options: Options) -> Mapping[str, Changes]:
    """Component -> call -> its op and what each option makes of it."""
    made: dict[str, dict[str, tuple[Key, list[Changed]]]] = {name: {} for name in networks}
    for (name, op), ops in options.items():
        network = networks[name]
        made[name][network.sites[op].node] = ((name, op), [network.changed(op, one) for one in ops])
    return made


def tapped(network: Network, inputs: Mapping[str, Tensor], changed: Changes) -> tuple[Tensor, list[Tap]]:
    """The output (several: packed), with the graph behind it, and a tap at each op."""
    taps: list[Tap] = []

    def tap(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> Tensor:
        if node.name not in changed:
            return value
        key, options = changed[node.name]
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        with torch.no_grad():
            errors = torch.stack([change(node, args, kwargs) - value for change in options])
        taps.append(Tap(key, value, errors))
        return value

    with torch.enable_grad():
        return pack(network(inputs, observe=tap)), taps


def gradients(value: Tensor, leaves: Sequence[Tensor], toward: Tensor, keep: bool) -> list[Tensor | None]:
    """Of `toward` times `value` at each of `leaves`, None where `value` does not depend on it."""
    return list(torch.autograd.grad(value, leaves, toward, retain_graph=keep, allow_unused=True))
