"""Weights that are trained and used as their codes: rounding counts as the identity on the way back.

The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432). What an op multiplies with is on its grid at
every step; the gradient there is taken for that of the float behind it. A palette's table learns too: the gradient of
an entry is the sum over the weights that use it, as learned step sizes have theirs (LSQ, arXiv 1902.08153). An affine
grid has no number of its own: its scale is the greatest weight's, and moves with that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.edit import weights
from edgegen.precision.arithmetic import at_once, by_tensor, int32_bias
from edgegen.precision.arithmetic import by_row as rows
from edgegen.precision.encode import WEIGHT_MAX, encode_weight
from edgegen.precision.plan import BITS, COMPRESSED, OpPlan
from edgegen.precision.repair.tensors import Tensors
from edgegen.precision.simulate import Changed, Network

Changes = Mapping[str, Mapping[str, Changed]]
SMALLEST_RMS = 1e-4
"""Below which a weight's own size says nothing about how far it may move in a step."""

TABLE = 0.1
"""Of a weight's step for an entry of its table, which moves all the weights that use it the same way."""


@dataclass(frozen=True)
class Straight(Changed):
    """As `Changed` computes the op, with gradients through ranges that are taken when they are met too."""

    def __call__(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.op.precision != "w8a8-dynamic":
            return super().__call__(node, args, kwargs)
        assert callable(node.target)
        given = [*args]
        given[0] = _passed(given[0], by_row=self.op.op == "linear")
        if self.op.op == "matmul":
            given[1] = _passed(given[1], by_row=False)
        else:
            given[1] = self.weight
        if self.bias is not None:
            given[2] = self.bias
        made: Tensor = node.target(*given, **kwargs)
        return made


def _passed(x: Tensor, by_row: bool) -> Tensor:
    """`x` through the int8 codes of its own range: on the way back they are not there."""
    found = x.detach()
    coded: Tensor = (rows if by_row else by_tensor)(at_once, found, found.dtype)
    return x + (coded - found)


class TrainedOp:
    """One op's weight behind its codes, and its bias. Rows share a grid: [N, G, M] affine, [T, M] of a palette."""

    def __init__(self, node: str, op: OpPlan, axis: int, weight: Tensor, bias: Tensor | None) -> None:
        self.node, self.op, self._axis = node, op, axis
        encoded = encode_weight(weight, op, axis, name=node)
        channels = weight.detach().movedim(axis, 0)
        self._shape = channels.shape
        rows = (len(encoded.tables),) if encoded.tables is not None else (len(channels), max(1, _groups(op, channels)))
        self.latent = channels.reshape(*rows, -1).float().clone()
        self.table = None if encoded.tables is None else encoded.tables.float().clone()
        self.bias = None if bias is None else bias.detach().float().clone()
        self._codes: Tensor | None = None
        self._scales: Tensor | None = None
        self._leaf = self._bias_leaf = torch.empty(0)
        self.rms = max(SMALLEST_RMS, float(self.latent.square().mean().sqrt()))
        self.settle()

    def parameters(self) -> dict[str, Tensor]:
        """By the last part of their names; what training changes, in place."""
        found = {"weight": self.latent, "table": self.table, "bias": self.bias}
        return {name: one for name, one in found.items() if one is not None}

    def settle(self) -> None:
        """The grid anew from the weights behind it: each affine scale, each weight's place in its table."""
        if self.table is None:
            encoded = encode_weight(self._back(self.latent), self.op, self._axis, name=self.node)
            assert encoded.scales is not None
            self._scales = encoded.scales.reshape(*self.latent.shape[:2], 1)
        else:
            self.table.copy_(self.table.sort(1).values)
            middles = (self.table[:, 1:] + self.table[:, :-1]) / 2
            self._codes = torch.searchsorted(middles.contiguous(), self.latent, out_int32=True).to(torch.uint8)

    def value(self) -> Tensor:
        """The weight on its grid, as the op takes it."""
        if self.table is not None:
            assert self._codes is not None
            return self._back(torch.gather(self.table, 1, self._codes.long()))
        assert self._scales is not None
        top = WEIGHT_MAX[BITS[self.op.precision]]
        return self._back((self.latent / self._scales).round_().clamp_(-top, top).mul_(self._scales))

    def changed(self, training: bool) -> Straight:
        """How the op is computed now; while `training`, its tensors gather gradients for `collect`."""
        value, bias = self.value(), self.bias
        if bias is not None:
            if self.op.precision == "w8a8":
                assert self._scales is not None and self.op.input is not None
                bias = int32_bias(bias, self._scales.flatten(), self.op.input)
            bias = bias.clone()
        if training:
            self._leaf = value.requires_grad_()
            if bias is not None:
                self._bias_leaf = bias.requires_grad_()
        return Straight(self.op, value, bias)

    def collect(self) -> None:
        """What the last `changed` gathered becomes the parameters' gradient; zeros where no call came by."""
        at_value = self._leaf.grad
        rows = torch.zeros_like(self.latent)
        if at_value is not None:
            rows = at_value.movedim(self._axis, 0).reshape(self.latent.shape)
        self.latent.grad = rows
        if self.table is not None:
            assert self._codes is not None
            self.table.grad = torch.zeros_like(self.table).scatter_add_(1, self._codes.long(), rows)
        if self.bias is not None:
            found = self._bias_leaf.grad
            self.bias.grad = torch.zeros_like(self.bias) if found is None else found
        self._leaf = self._bias_leaf = torch.empty(0)

    def tensors(self) -> Tensors:
        """As repairs name them. The weight is on its grid, which encoding it finds again."""
        self.settle()
        made = {f"{self.node}:1": self.value().clone()}
        return made if self.bias is None else {**made, f"{self.node}:2": self.bias.clone()}

    def _back(self, rows: Tensor) -> Tensor:
        return rows.reshape(self._shape).movedim(0, self._axis).contiguous()


def _groups(op: OpPlan, channels: Tensor) -> int:
    return channels.shape[1] // op.group if op.group else 1


@dataclass(frozen=True)
class Trainable:
    """What is trained of several networks: weights of compressed ops that no other call reads, and their biases."""

    ops: Mapping[str, Mapping[str, TrainedOp]]
    """Component -> call."""
    fixed: Changes
    """Compressed ops without a weight of their own: they are computed as the plan says, and stay as they are."""

    @staticmethod
    def of(networks: Mapping[str, Network], plans: Mapping[str, Mapping[str, OpPlan]]) -> Trainable:
        """`networks` have the graphs that repairs left."""
        ops: dict[str, dict[str, TrainedOp]] = {name: {} for name in networks}
        fixed: dict[str, dict[str, Changed]] = {name: {} for name in networks}
        for name, plan in plans.items():
            network = networks[name]
            held = weights(network.program)
            calls = {node.name: node for node in network.program.graph.nodes}
            for key, op in plan.items():
                site = network.sites[key]
                if op.precision not in COMPRESSED:
                    continue
                if site.weight is None or len(calls[site.weight].users) != 1:
                    made = network.changed(key, op)
                    fixed[name][site.node] = Straight(made.op, made.weight, made.bias)
                    continue
                bias = _bias(calls[site.node], held)
                ops[name][site.node] = TrainedOp(site.node, op, site.axis, held[site.weight], bias)
        return Trainable(ops, fixed)

    def each(self) -> Iterator[tuple[str, TrainedOp]]:
        """With the name of its component."""
        for name, found in self.ops.items():
            for op in found.values():
                yield name, op

    def parameters(self) -> dict[str, Tensor]:
        """`component/call/part` -> what is trained."""
        return {
            f"{name}/{op.node}/{part}": value for name, op in self.each() for part, value in op.parameters().items()
        }

    def rates(self) -> dict[str, float]:
        """By the same names: how large the weight is that a parameter belongs to, which a step is a share of."""
        return {
            f"{name}/{op.node}/{part}": op.rms * (TABLE if part == "table" else 1.0)
            for name, op in self.each()
            for part in op.parameters()
        }

    def settle(self) -> None:
        for _, op in self.each():
            op.settle()

    def changes(self, training: bool = False) -> dict[str, dict[str, Changed]]:
        """Component -> call -> how it is computed now."""
        return {
            name: {**self.fixed.get(name, {}), **{call: op.changed(training) for call, op in found.items()}}
            for name, found in self.ops.items()
        }

    def collect(self) -> None:
        for _, op in self.each():
            op.collect()

    def tensors(self) -> dict[str, Tensors]:
        """Component -> what a plan's file has of it."""
        made: dict[str, Tensors] = {}
        for name, op in self.each():
            made.setdefault(name, {}).update(op.tensors())
        return made


def _bias(node: Node, held: Mapping[str, Tensor]) -> Tensor | None:
    found: Any = node.args[2] if len(node.args) > 2 else None
    return held.get(found.name) if isinstance(found, Node) else None
