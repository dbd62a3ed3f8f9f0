"""Capture: a component becomes a `torch.export.ExportedProgram`, the one IR of the compiler."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgegen.errors import EdgegenError
from edgegen.students.student import Component


class HalfPrecision(nn.Module):
    """Runs `module` in fp16 behind a float32 boundary; integer inputs, and those named in `kept`, pass unchanged.

    A timestep is kept: near 1000 a step of fp16 is half a radian of its embedding.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], kept: frozenset[str] = frozenset({"timestep"})) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).half()
        self.cast = tuple(name not in kept for name in names)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        pairs = zip(inputs, self.cast, strict=True)
        out = self.module(*(x.half() if cast and x.is_floating_point() else x for x, cast in pairs))
        return out.float() if isinstance(out, Tensor) else tuple(part.float() for part in out)


def capture(component: Component, *, half: bool = False) -> ExportedProgram:
    """Export `component` with static shapes; `half` captures its fp16 form. EdgegenError when it cannot be traced."""
    module = HalfPrecision(component.module, [spec.name for spec in component.inputs]) if half else component.module
    try:
        with torch.no_grad():
            return torch.export.export(module.eval(), component.example_inputs())
    except Exception as error:
        raise EdgegenError(
            f"component `{component.name}` cannot be captured: {type(error).__name__}: {str(error).splitlines()[0]}",
            hint="the network must trace under `torch.export` with static shapes",
        ) from error
