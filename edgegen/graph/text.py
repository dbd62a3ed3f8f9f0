"""A graph as text for people: one value a line, with where it came from and which passes made it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import made_by, module_path

SHORT = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}
WIDEST = 110


def graph_text(program: ExportedProgram) -> str:
    """Every value in order: `%name: f32[1, 4] = aten.op.overload(%a, 2)  # module path; passes that made it`."""
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    lines = []
    for node in program.graph.nodes:
        text = f"return {_argument(node.args[0])}" if node.op == "output" else f"{_head(node)} = {_said(node, targets)}"
        notes = "; ".join(note for note in (module_path(node), " < ".join(made_by(node))) if note)
        lines.append((text, notes))
    width = min(WIDEST, max(len(text) for text, _ in lines))
    return "".join(f"{text.ljust(width)}  # {notes}\n" if notes else f"{text}\n" for text, notes in lines)


def _head(node: Node) -> str:
    return f"%{node.name}: {_type(node.meta.get('val'))}"


def _said(node: Node, targets: dict[str, str | None]) -> str:
    if node.op == "placeholder":
        target = targets.get(node.name)
        return "input" if target is None else f"weight[{target}]"
    parts = [_argument(one) for one in node.args]
    parts += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", "?")
    return f"{name}({', '.join(parts)})"


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(one) for one in value)}]"
    return repr(value).removeprefix("torch.")


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{SHORT.get(value.dtype, str(value.dtype))}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"({', '.join(_type(one) for one in value)})"
    return type(value).__name__
