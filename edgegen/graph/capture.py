"""Capture: a component becomes a `torch.export.ExportedProgram`, the one IR of the compiler."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor, user_inputs
from edgegen.graph.inline_regions import inline_regions
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.student import Component


def capture(component: Component) -> ExportedProgram:
    """Export `component` with static shapes; its inputs bear the names of the component's specs.

    EdgegenError when it cannot be traced.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(component.module.eval(), component.example_inputs())
    except Exception as error:
        raise EdgegenError(
            f"component `{component.name}` cannot be captured: {type(error).__name__}: {str(error).splitlines()[0]}",
            hint="the network must trace under `torch.export` with static shapes",
        ) from error
    program = inline_regions(program)
    names = [spec.name for spec in component.inputs]
    if [node.name for node in user_inputs(program)] == names:
        return program
    editor = Editor(program, "capture")
    editor.rename_inputs(names)
    return editor.finish()


def signature(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """What a graph takes, in order, by the names of its placeholders."""
    return tuple(
        TensorSpec.model_validate(
            {
                "name": node.name,
                "shape": tuple(node.meta["val"].shape),
                "dtype": str(node.meta["val"].dtype).removeprefix("torch."),
            }
        )
        for node in user_inputs(program)
    )
