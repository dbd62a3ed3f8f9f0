"""Capture: a component becomes a `torch.export.ExportedProgram`, the one IR of the compiler."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgegen.errors import EdgegenError
from edgegen.students.student import Component


class HalfPrecision(nn.Module):
    """Runs `module` in fp16 behind a float32 boundary; integer inputs pass unchanged."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).half()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = self.module(*(x.half() if x.is_floating_point() else x for x in inputs))
        return out.float() if isinstance(out, Tensor) else tuple(part.float() for part in out)


def capture(component: Component, *, half: bool = False) -> ExportedProgram:
    """Export `component` with static shapes; `half` captures its fp16 form. EdgegenError when it cannot be traced."""
    module = HalfPrecision(component.module) if half else component.module
    try:
        with torch.no_grad():
            return torch.export.export(module.eval(), component.example_inputs())
    except Exception as error:
        raise EdgegenError(
            f"component `{component.name}` cannot be captured: {type(error).__name__}: {str(error).splitlines()[0]}",
            hint="the network must trace under `torch.export` with static shapes",
        ) from error
