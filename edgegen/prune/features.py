"""What goes on inside two networks of which one was cut out of the other, channel by channel.

Watched is what goes into norms that have weights: the residual stream at every block, and what is between the two
convolutions of one. A network without norms is watched where it enters its convolutions. Which of the large network's
channels are left says the record of the cut, by the positions of that norm's or convolution's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edgegen.students.networks.separable_conv import SeparableConv
from edgegen.students.pruning import Pruning

TINY = 1e-6


@dataclass(frozen=True)
class Tap:
    """One input that is watched: of module `path`, its channels along `dim` (negative: from the end)."""

    path: str
    dim: int
    kept: Tensor | None
    """int64 positions in the large network; None: all."""


def taps(small: nn.Module, large: nn.Module, pruning: Pruning) -> tuple[Tap, ...]:
    """What can be held against each other; in the order in which `small` names its modules."""
    kinds = {path: one.__class__ for path, one in large.named_modules()}
    found = [_tap(path, one, pruning) for path, one in small.named_modules() if _same(one.__class__, kinds.get(path))]
    seen = [tap for tap in found if tap is not None]
    norms = tuple(tap for tap in seen if issubclass(kinds[tap.path], _NORMS))
    # What goes into the first convolution is what went into the network.
    return norms or tuple(seen[1:])


_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def _same(mine: type[nn.Module], theirs: type[nn.Module] | None) -> bool:
    return mine is theirs or (mine is SeparableConv and theirs is nn.Conv2d)


def _tap(path: str, module: nn.Module, pruning: Pruning) -> Tap | None:
    if isinstance(module, SeparableConv):
        filters = _kept(pruning, f"{path}.depthwise", 0)
        rank = module.depthwise.out_channels // module.depthwise.in_channels
        return Tap(path, 1, None if filters is None else filters[::rank] // rank)
    if getattr(module, "weight", None) is None:
        return None
    if isinstance(module, nn.GroupNorm):
        return Tap(path, 1, _kept(pruning, path, 0))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1:
        return Tap(path, -1, _kept(pruning, path, 0))
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return Tap(path, 1, _kept(pruning, path, 1))
    return None


def _kept(pruning: Pruning, path: str, dim: int) -> Tensor | None:
    positions = pruning.positions(f"{path}.weight", dim)
    return None if positions is None else torch.tensor(positions)


@dataclass
class Watch:
    """A context in which the inputs of `taps` in `module` are remembered, of its last call."""

    module: nn.Module
    taps: tuple[Tap, ...]
    seen: dict[str, Tensor] = field(default_factory=dict)
    _handles: list[RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> Watch:
        for tap in self.taps:

            def remember(_: nn.Module, args: tuple[Any, ...], path: str = tap.path) -> None:
                self.seen[path] = args[0]

            self._handles.append(self.module.get_submodule(tap.path).register_forward_pre_hook(remember))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.seen.clear()


def difference(taps: tuple[Tap, ...], made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """Mean over `taps` of squared error over squares, on the channels that are left."""
    losses = []
    for tap in taps:
        if tap.path not in made or tap.path not in wanted:
            continue
        mine, theirs = made[tap.path].float(), wanted[tap.path].float()
        if tap.kept is not None:
            theirs = theirs.index_select(tap.dim, tap.kept.to(theirs.device))
        losses.append((mine - theirs).square().mean() / (theirs.square().mean() + TINY))
    return torch.stack(losses).mean() if losses else torch.zeros(())
